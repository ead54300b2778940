"""Generated from protos/apollo/sidecar by `make protos`."""

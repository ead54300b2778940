"""Generated from protos/apollo/sidecar/v1 by `make protos`."""

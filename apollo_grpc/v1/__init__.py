"""Generated from protos/apollo/v1 by `make protos`."""

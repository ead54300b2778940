"""From the sidecar's manifest to a verified transformers model over the live weights."""

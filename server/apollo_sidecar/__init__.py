"""The sidecar: what vLLM loads to share its live weights; thin, and without training code."""

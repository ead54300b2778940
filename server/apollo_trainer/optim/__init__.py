"""The APOLLO optimizer (Zhu et al., arXiv 2412.05270)."""

from apollo_trainer.optim.apollo import Apollo

__all__ = ["Apollo"]

"""What watchers are told: fed by runs, read by services."""

from apollo_trainer.watching.ring import Ring, Watcher

__all__ = ["Ring", "Watcher"]

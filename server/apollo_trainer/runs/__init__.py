"""Training runs: queued, executed and saved."""

from apollo_trainer.runs.queue import RunQueue
from apollo_trainer.runs.run import prepare_run

__all__ = ["RunQueue", "prepare_run"]

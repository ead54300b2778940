"""Training runs: queued, executed, told as events, and kept on disk."""

from apollo_trainer.runs.events import PAGE, require_next, require_reached
from apollo_trainer.runs.ledger import RunRow
from apollo_trainer.runs.queue import RunQueue
from apollo_trainer.runs.run import prepare_run

__all__ = ["PAGE", "RunQueue", "RunRow", "prepare_run", "require_next", "require_reached"]

"""What callers ask of checkpoints: operations that last, are watched and can be cancelled."""

from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs, Restored, find_snapshot
from apollo_trainer.operations.job import stopped

__all__ = ["CheckpointJobs", "Restored", "find_snapshot", "stopped"]

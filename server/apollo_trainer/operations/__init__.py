"""Jobs on checkpoints that callers begin, watch and cancel."""

from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from apollo_trainer.operations.job import Job, stopped
from apollo_trainer.operations.restore import Restore, Restored, find_snapshot

__all__ = ["CheckpointJobs", "Job", "Restore", "Restored", "find_snapshot", "stopped"]

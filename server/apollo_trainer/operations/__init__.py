"""Operations on checkpoints: callers begin, watch and cancel them, and they are kept on disk."""

from apollo_trainer.operations.checkpoint_jobs import CheckpointJobs
from apollo_trainer.operations.job import Job, stopped
from apollo_trainer.operations.operation import Asked, Operation, refused_by_disk
from apollo_trainer.operations.operations import Operations
from apollo_trainer.operations.restore import Restore, Restored, find_snapshot

__all__ = [
    "Asked",
    "CheckpointJobs",
    "Job",
    "Operation",
    "Operations",
    "Restore",
    "Restored",
    "find_snapshot",
    "refused_by_disk",
    "stopped",
]

"""Ways back to earlier weights: named snapshots, the undo ring, and the restore of both."""

from apollo_trainer.checkpoints.snapshots.copy import SnapshotCopy, SnapshotWriter
from apollo_trainer.checkpoints.snapshots.model_state import ModelState
from apollo_trainer.checkpoints.snapshots.poison import Poison
from apollo_trainer.checkpoints.snapshots.restoring import restore
from apollo_trainer.checkpoints.snapshots.snapshot_info import SnapshotInfo
from apollo_trainer.checkpoints.snapshots.snapshot_store import SnapshotStore
from apollo_trainer.checkpoints.snapshots.undo_ring import UndoRing
from apollo_trainer.checkpoints.snapshots.write_watch import WriteVersions, WriteWatch

__all__ = [
    "ModelState",
    "Poison",
    "SnapshotCopy",
    "SnapshotInfo",
    "SnapshotStore",
    "SnapshotWriter",
    "UndoRing",
    "WriteVersions",
    "WriteWatch",
    "restore",
]

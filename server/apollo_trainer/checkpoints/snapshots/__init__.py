"""Earlier weights: snapshots on disk, the undo ring in memory, and the restore of both."""

from apollo_trainer.checkpoints.snapshots.copy_on_write import SnapshotCopy
from apollo_trainer.checkpoints.snapshots.model_state import ModelState, of_all_ranks
from apollo_trainer.checkpoints.snapshots.restoring import Poison, restore, restore_part
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
    "UndoRing",
    "WriteVersions",
    "WriteWatch",
    "of_all_ranks",
    "restore",
    "restore_part",
]

"""The model directory: synced, recovered, verified, adopted and exported."""

from apollo_trainer.checkpoints.directory.adopt import Adoption, adopt_directory
from apollo_trainer.checkpoints.directory.export import Exported, export_directory
from apollo_trainer.checkpoints.directory.preconditions import refuse_read_only, why_not_synced
from apollo_trainer.checkpoints.directory.recovery import recover_directory, settle_directory
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import Place, SyncMethod, owned, place_under
from apollo_trainer.checkpoints.directory.survey import Progress, SyncOutcome
from apollo_trainer.checkpoints.directory.sync import SyncOptions, sync_directory
from apollo_trainer.checkpoints.directory.verify import Verification, verify_directory

__all__ = [
    "Adoption",
    "Exported",
    "Place",
    "Progress",
    "Spare",
    "SyncMethod",
    "SyncOptions",
    "SyncOutcome",
    "Verification",
    "adopt_directory",
    "export_directory",
    "owned",
    "place_under",
    "recover_directory",
    "refuse_read_only",
    "settle_directory",
    "sync_directory",
    "verify_directory",
    "why_not_synced",
]

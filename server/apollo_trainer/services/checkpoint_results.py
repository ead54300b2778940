"""What jobs on checkpoints came to, as messages of the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_trainer.checkpoints.directory import Adoption, Exported, SyncOutcome, Verification
from apollo_trainer.checkpoints.snapshots import SnapshotInfo
from apollo_trainer.operations import Restored


def outcome_of(field: str, read: Callable[[Any], Any]) -> Callable[[Any], pb.Operation]:
    """Makes what a job came to the outcome of its operation, in the field of its kind."""
    return lambda done: pb.Operation(**{field: read(done)})


def sync_result(done: tuple[SyncOutcome, int]) -> pb.SyncResult:
    """Of a sync and the weight version that it wrote."""
    outcome, version = done
    return pb.SyncResult(
        bytes_compared=outcome.bytes_compared,
        bytes_written=outcome.bytes_written,
        tensors_changed=outcome.tensors_changed,
        weight_version=version,
        method=pb.SyncMethod.Value(f"SYNC_METHOD_{outcome.method.name}"),
        files_written=outcome.files_written,
    )


def verify_result(done: tuple[str, Verification]) -> pb.VerifyResult:
    """Of a comparison of a model directory."""
    directory, found = done
    return pb.VerifyResult(
        directory=directory,
        generation=found.generation,
        tensors=found.tensors,
        bytes_read=found.bytes_read,
        differences=[pb.Difference(**vars(difference)) for difference in found.differences],
    )


def adopt_result(done: Adoption) -> pb.AdoptResult:
    """Of a private copy."""
    return pb.AdoptResult(
        directory=str(done.directory), files=done.files, bytes_written=done.bytes_written
    )


def snapshot_message(info: SnapshotInfo) -> pb.Snapshot:
    """Of one snapshot."""
    snapshot = pb.Snapshot(
        snapshot_id=info.id,
        name=info.name,
        weight_version=info.weight_version,
        optimizer_step=info.optimizer_step,
        size_bytes=info.size_bytes,
        anchor_id=info.anchor,
    )
    snapshot.create_time.FromNanoseconds(int(info.created * 1e9))
    return snapshot


def restore_result(done: Restored) -> pb.RestoreResult:
    """Of a restore or an undo."""
    return pb.RestoreResult(
        weight_version=done.weight_version,
        optimizer_step=done.optimizer_step,
        bytes_written=done.bytes_written,
        warnings=done.warnings,
    )


def export_result(directory: str, done: tuple[Exported, int]) -> pb.ExportResult:
    """Of an export and the weight version that it wrote."""
    exported, version = done
    return pb.ExportResult(
        directory=directory, bytes_written=exported.bytes_written, weight_version=version
    )


def cancel_state(heeded: bool, ended: bool) -> pb.CancelState.ValueType:
    """Of a job that was asked to stop: whether it will, and whether it has."""
    if not heeded:
        return pb.CANCEL_STATE_TOO_LATE
    return pb.CANCEL_STATE_CANCELLED if ended else pb.CANCEL_STATE_STOPPING

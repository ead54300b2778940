"""CheckpointService of a fake server: no file is written."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from apollo_client.testing.memory import DIRECTORY, WEIGHT_BYTES, KeptSnapshot, not_found
from apollo_client.testing.operations import Operations
from apollo_client.testing.paging import page_of, refuse, wrong_page
from apollo_grpc.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    Resource,
)
from apollo_grpc.times import now
from apollo_grpc.v1 import checkpoint_pb2 as cp

ASKED_METHODS = (
    cp.SYNC_METHOD_UNSPECIFIED,
    cp.SYNC_METHOD_EXCHANGE,
    cp.SYNC_METHOD_ROLLFORWARD,
    cp.SYNC_METHOD_IN_PLACE,
)
TENSORS = 2
Outcome = tuple[str, Any] | None


class Checkpoints(Operations):
    """Each method without an underscore is an RPC by its name."""

    # --- operations ---------------------------------------------------------------------------

    def sync(self, request: cp.SyncRequest, context: Any) -> Iterator[cp.SyncResponse]:
        """Counts the directory as that of the live weights."""
        if request.method not in ASKED_METHODS:
            says = "only EXCHANGE, ROLLFORWARD and IN_PLACE can be asked for"
            raise InvalidArgument.at("method", says)
        work = partial(self._synced, request)
        for told in self._told(cp.OPERATION_KIND_SYNC, request, work, context):
            yield cp.SyncResponse(**told)

    def verify(self, request: cp.VerifyRequest, context: Any) -> Iterator[cp.VerifyResponse]:
        """Finds all as it was left."""
        work = partial(self._verified, request)
        for told in self._told(cp.OPERATION_KIND_VERIFY, request, work, context):
            yield cp.VerifyResponse(**told)

    def adopt(self, request: cp.AdoptRequest, context: Any) -> Iterator[cp.AdoptResponse]:
        """Counts a folder as a copy."""
        work = partial(self._adopted, _absolute(request.directory))
        for told in self._told(cp.OPERATION_KIND_ADOPT, request, work, context):
            yield cp.AdoptResponse(**told)

    def export(self, request: cp.ExportRequest, context: Any) -> Iterator[cp.ExportResponse]:
        """Counts a folder as an export."""
        work = partial(self._exported, request, _absolute(request.directory))
        for told in self._told(cp.OPERATION_KIND_EXPORT, request, work, context):
            yield cp.ExportResponse(**told)

    def create_snapshot(
        self, request: cp.CreateSnapshotRequest, context: Any
    ) -> Iterator[cp.CreateSnapshotResponse]:
        """Keeps the optimizer's step."""
        kind, work = cp.OPERATION_KIND_CREATE_SNAPSHOT, partial(self._made, request)
        for told in self._told(kind, request, work, context, "snapshot"):
            yield cp.CreateSnapshotResponse(**told)

    def restore_snapshot(
        self, request: cp.RestoreSnapshotRequest, context: Any
    ) -> Iterator[cp.RestoreSnapshotResponse]:
        """Puts it back."""
        kind, work = cp.OPERATION_KIND_RESTORE_SNAPSHOT, partial(self._restored, request)
        for told in self._told(kind, request, work, context):
            yield cp.RestoreSnapshotResponse(**told)

    def undo(self, request: cp.UndoRequest, context: Any) -> Iterator[cp.UndoResponse]:
        """Takes updates back."""
        if request.updates < 0:
            raise InvalidArgument.at("updates", "must not be negative")
        work = partial(self._undone, request)
        for told in self._told(cp.OPERATION_KIND_UNDO, request, work, context):
            yield cp.UndoResponse(**told)

    def delete_snapshot(
        self, request: cp.DeleteSnapshotRequest, context: Any
    ) -> cp.DeleteSnapshotResponse:
        """Deletes one."""
        kind, work = cp.OPERATION_KIND_DELETE_SNAPSHOT, partial(self._deleted, request)
        kept = self._begin(kind, request, work)
        list(self._follow(kept, context))
        if kept.error:
            raise kept.error
        return cp.DeleteSnapshotResponse()

    def _told(
        self,
        kind: cp.OperationKind.ValueType,
        request: Any,
        work: Callable[[], Outcome],
        context: Any,
        result: str = "result",
    ) -> Iterator[dict[str, Any]]:
        """The fields of each message: the id, then progress, then the outcome."""
        kept, seen = self._begin(kind, request, work), cp.Operation()
        about: dict[str, Any] = {"operation_id": kept.message.operation_id}
        if not kept.message.HasField("end_time"):
            yield about
        for seen in self._follow(kept, context):
            if seen.HasField("progress"):
                yield about | {"progress": seen.progress}
        if kept.error:
            raise kept.error
        if outcome := seen.WhichOneof("outcome"):
            yield about | {result: getattr(seen, outcome)}

    # --- what they do, with the lock held -----------------------------------------------------

    def _synced(self, request: cp.SyncRequest) -> Outcome:
        memory = self._memory
        memory.require_version(request)
        version, last = memory.weight_version, memory.last_sync
        result = cp.SyncResult(bytes_compared=WEIGHT_BYTES, weight_version=version)
        result.method = cp.SYNC_METHOD_UNCHANGED
        if not memory.generation or last.weight_version != version:
            memory.generation += 1
            result.method = request.method or cp.SYNC_METHOD_EXCHANGE
            result.bytes_written, result.tensors_changed = WEIGHT_BYTES, TENSORS
            result.files_written.append("model.safetensors")
        last.time.CopyFrom(now())
        last.weight_version, last.directory = version, DIRECTORY
        return "sync", result

    def _verified(self, request: cp.VerifyRequest) -> Outcome:
        generation = self._memory.generation
        if not generation:
            words = "The directory was never synced; nothing was compared. Sync first."
            raise FailedPrecondition(words, reason="NEVER_SYNCED")
        result = cp.VerifyResult(directory=DIRECTORY, generation=generation, tensors=TENSORS)
        result.bytes_read = WEIGHT_BYTES if request.full else 0
        return "verify", result

    def _adopted(self, directory: str) -> Outcome:
        self._take(directory, "FOLDER_EXISTS")
        return "adopt", cp.AdoptResult(directory=directory, files=3, bytes_written=WEIGHT_BYTES)

    def _exported(self, request: cp.ExportRequest, directory: str) -> Outcome:
        self._memory.require_version(request)
        self._take(directory, "EXPORT_EXISTS")
        version = self._memory.weight_version
        result = cp.ExportResult(directory=directory, weight_version=version)
        result.bytes_written = WEIGHT_BYTES
        return "export", result

    def _take(self, directory: str, reason: str) -> None:
        if directory in self._memory.directories or Path(directory).exists():
            words = f"{directory} exists; nothing was written."
            about = Resource("directory", directory)
            raise AlreadyExists(words, reason=reason, resource=about)
        self._memory.directories.add(directory)

    def _made(self, request: cp.CreateSnapshotRequest) -> Outcome:
        memory = self._memory
        memory.require_version(request)
        if request.name and any(
            kept.message.name == request.name for kept in memory.snapshots.values()
        ):
            words = f"There is a snapshot {request.name!r}; nothing was written."
            about = Resource("snapshot", request.name)
            raise AlreadyExists(words, reason="SNAPSHOT_EXISTS", resource=about)
        made = cp.Snapshot(
            snapshot_id=uuid.uuid4().hex,
            name=request.name,
            create_time=now(),
            weight_version=memory.weight_version,
            optimizer_step=memory.optimizer_step,
            size_bytes=WEIGHT_BYTES,
        )
        memory.snapshots[made.snapshot_id] = KeptSnapshot(memory.number(), made)
        return "snapshot", made

    def _restored(self, request: cp.RestoreSnapshotRequest) -> Outcome:
        self._memory.require_version(request)
        step = self._snapshot(request.snapshot_id).message.optimizer_step
        self._memory.undoable.clear()
        self._memory.set_back(step)
        return self._back()

    def _undone(self, request: cp.UndoRequest) -> Outcome:
        memory, updates = self._memory, request.updates or 1
        memory.require_version(request)
        if updates > len(memory.undoable):
            words = f"{len(memory.undoable)} updates can be taken back, not {updates}."
            raise OutOfRange(words, reason="UNDO_OUT_OF_RANGE")
        memory.take_back(updates)
        return self._back()

    def _back(self) -> Outcome:
        memory = self._memory
        result = cp.RestoreResult(weight_version=memory.weight_version, bytes_written=WEIGHT_BYTES)
        result.optimizer_step = memory.optimizer_step
        return "restore", result

    def _deleted(self, request: cp.DeleteSnapshotRequest) -> Outcome:
        found = self._snapshot(request.snapshot_id)
        del self._memory.snapshots[found.message.snapshot_id]
        return None

    # --- snapshots ----------------------------------------------------------------------------

    def get_snapshot(self, request: cp.GetSnapshotRequest, context: Any) -> cp.GetSnapshotResponse:
        """One snapshot, by id or name."""
        with self._memory.changed:
            return cp.GetSnapshotResponse(snapshot=self._snapshot(request.snapshot_id).message)

    def list_snapshots(
        self, request: cp.ListSnapshotsRequest, context: Any
    ) -> cp.ListSnapshotsResponse:
        """A page of snapshots."""
        refuse(wrong_page(request))
        with self._memory.changed:
            kept = list(self._memory.snapshots.values())
        page, token = page_of(kept, lambda each: each.number, request)
        found = [each.message for each in page]
        return cp.ListSnapshotsResponse(snapshots=found, next_page_token=token)

    def _snapshot(self, name: str) -> KeptSnapshot:
        for kept in self._memory.snapshots.values():
            if name and name in (kept.message.snapshot_id, kept.message.name):
                return kept
        raise not_found("snapshot", name)


def _absolute(directory: str) -> str:
    if not Path(directory).is_absolute():
        says = "must be the absolute path of a folder that does not exist yet"
        raise InvalidArgument.at("directory", says)
    return directory

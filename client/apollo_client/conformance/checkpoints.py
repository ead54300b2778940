"""The model directory, snapshots, and the ways back."""

from __future__ import annotations

import grpc

from apollo_client.conformance.operation_streams import done, snapshot, updated
from apollo_client.conformance.paging import require_newest_first
from apollo_client.conformance.promises import Level, promise
from apollo_client.conformance.requirements import NotApplicableError, require, require_equal
from apollo_client.conformance.server import Server
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import status_pb2

NOT_FOUND = grpc.StatusCode.NOT_FOUND, "SNAPSHOT_NOT_FOUND"
CHANGED = grpc.StatusCode.ABORTED, "WEIGHT_VERSION_CHANGED"
ALREADY = grpc.StatusCode.ALREADY_EXISTS
AHEAD = 10**6
FAR = 2**31 - 1


@promise(Level.CHECKPOINTS)
def a_sync_writes_the_live_weights(server: Server) -> None:
    """Sync brings the model directory up to date, and the status says when it last did."""
    version = server.status().weight_version
    result = done(server, cp.SyncRequest()).result
    require(result.weight_version >= version, f"it wrote version {result.weight_version}")
    last = server.status().last_sync
    require(last.weight_version >= result.weight_version, "an older version in `last_sync`")
    require_equal(last.directory, server.info.model.directory, "directory in `last_sync`")


@promise(Level.CHECKPOINTS)
def a_sync_of_what_is_there_writes_nothing(server: Server) -> None:
    """SYNC_METHOD_UNCHANGED: nothing had changed; nothing was written."""
    first = done(server, cp.SyncRequest()).result
    again = done(server, cp.SyncRequest()).result
    if again.weight_version != first.weight_version:
        raise NotApplicableError("others train on this server meanwhile")
    require_equal(again.method, cp.SYNC_METHOD_UNCHANGED, "the method")
    require_equal((again.bytes_written, again.tensors_changed), (0, 0), "bytes, tensors")


@promise(Level.CHECKPOINTS)
def a_directory_that_was_synced_is_verified(server: Server) -> None:
    """Verify compares the model directory with what the last sync left there."""
    done(server, cp.SyncRequest())
    result = done(server, cp.VerifyRequest(full=True)).result
    require_equal(list(result.differences), [], "differences")
    require(result.bytes_read > 0 and result.tensors > 0, "nothing was read")
    require_equal(result.directory, server.info.model.directory, "directory")


@promise(Level.CHECKPOINTS)
def a_snapshot_is_kept(server: Server) -> None:
    """CreateSnapshot keeps the weights of this moment under a name; GetSnapshot returns it."""
    name = server.name()
    made = snapshot(server, name=name)
    require_equal(made.name, name, "name")
    require(made.snapshot_id and made.create_time.ToNanoseconds(), "no id, or no time")
    found = server.ask(cp.GetSnapshotRequest(snapshot_id=made.snapshot_id)).snapshot
    require_equal(found, made, "GetSnapshot")


@promise(Level.CHECKPOINTS)
def pages_of_snapshots_join_to_the_whole(server: Server) -> None:
    """ListSnapshots lists newest first; its pages join to the whole."""
    made = [snapshot(server).snapshot_id for _ in range(3)]
    require_newest_first(server, cp.ListSnapshotsRequest(), "snapshots", "snapshot_id", made)


@promise(Level.CHECKPOINTS)
def a_deleted_snapshot_is_gone(server: Server) -> None:
    """DeleteSnapshot deletes one snapshot: it is not found."""
    name = snapshot(server).snapshot_id
    server.ask(cp.DeleteSnapshotRequest(snapshot_id=name))
    for kind in (cp.GetSnapshotRequest, cp.DeleteSnapshotRequest, cp.RestoreSnapshotRequest):
        server.refused(kind(snapshot_id=name), *NOT_FOUND)


@promise(Level.CHECKPOINTS)
def a_restore_raises_the_weight_version(server: Server) -> None:
    """RestoreSnapshot puts weights and Apollo state back together; versions only go up."""
    version = server.status().weight_version
    made = snapshot(server, expected_weight_version=version)
    after = updated(server, version)
    request = cp.RestoreSnapshotRequest(snapshot_id=made.snapshot_id, expected_weight_version=after)
    result = done(server, request).result
    require_equal(result.weight_version, after + 1, "weight_version after the restore")
    require_equal(result.optimizer_step, made.optimizer_step, "optimizer_step")
    require(server.status().weight_version > after, "an older version in GetStatus")


@promise(Level.CHECKPOINTS)
def an_undo_takes_the_last_update_back(server: Server) -> None:
    """Undo takes the last updates back: the optimizer's steps too; the version goes up."""
    status = server.status()
    after = updated(server, status.weight_version)
    if not server.ask(status_pb2.GetServerInfoRequest()).model.undoable_updates:
        raise NotApplicableError("the server keeps no updates to take back")
    result = done(server, cp.UndoRequest(expected_weight_version=after)).result
    require_equal(result.weight_version, after + 1, "weight_version after the undo")
    require_equal(result.optimizer_step, status.optimizer_step, "optimizer_step")


@promise(Level.CHECKPOINTS)
def more_updates_than_are_kept_are_not_undone(server: Server) -> None:
    """Undo of more updates than are kept is OUT_OF_RANGE."""
    server.refused(cp.UndoRequest(updates=FAR), grpc.StatusCode.OUT_OF_RANGE)


@promise(Level.CHECKPOINTS)
def other_versions_are_not_kept(server: Server) -> None:
    """ABORTED (WEIGHT_VERSION_CHANGED) where the weights have another version than expected."""
    name = snapshot(server).snapshot_id
    version = server.status().weight_version + AHEAD
    for request in (
        cp.SyncRequest(expected_weight_version=version),
        cp.CreateSnapshotRequest(expected_weight_version=version),
        cp.RestoreSnapshotRequest(snapshot_id=name, expected_weight_version=version),
        cp.UndoRequest(expected_weight_version=version),
    ):
        server.refused(request, *CHANGED)


@promise(Level.CHECKPOINTS)
def an_export_is_a_new_directory(server: Server) -> None:
    """Export writes a new, complete directory; one that is there already is ALREADY_EXISTS."""
    directory = _folder(server, "export")
    result = done(server, cp.ExportRequest(directory=directory)).result
    require_equal(result.directory, directory, "directory")
    require(result.bytes_written > 0, "nothing was written")
    server.refused(cp.ExportRequest(directory=directory), ALREADY)


@promise(Level.CHECKPOINTS)
def an_adoption_is_a_copy(server: Server) -> None:
    """Adopt makes a private copy of the model directory; a folder there is ALREADY_EXISTS."""
    directory = _folder(server, "adopted")
    result = done(server, cp.AdoptRequest(directory=directory)).result
    require_equal(result.directory, directory, "directory")
    require(result.files > 0 and result.bytes_written > 0, "nothing was copied")
    server.refused(cp.AdoptRequest(directory=directory), ALREADY)


def _folder(server: Server, name: str) -> str:
    if not server.folder:
        raise NotApplicableError("no --folder of the server's machine to write to")
    return f"{server.folder}/{name}-{server.tag}"

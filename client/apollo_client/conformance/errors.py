"""How wrong requests are refused: the code, the reason, and the path of each wrong field."""

from __future__ import annotations

from typing import Any

import grpc

from apollo_client.conformance.promises import promise
from apollo_client.conformance.requirements import require, require_equal
from apollo_client.conformance.server import Server, sample
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import training_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
OUT_OF_RANGE = grpc.StatusCode.OUT_OF_RANGE
NOBODY = "apollo-conformance-no-such"
TOO_LONG = "x" * 257
FAR = 10**12
# A value that no enumeration has.
UNKNOWN: Any = 99


@promise(trains=False)
def unknown_runs_are_not_found(server: Server) -> None:
    """NOT_FOUND (RUN_NOT_FOUND): no such run."""
    for kind in (pb.GetRunRequest, pb.WatchRunRequest, pb.CancelRunRequest, pb.DeleteRunRequest):
        server.refused(kind(run_id=NOBODY), NOT_FOUND, "RUN_NOT_FOUND")


@promise(trains=False)
def unknown_operations_are_not_found(server: Server) -> None:
    """NOT_FOUND (OPERATION_NOT_FOUND): no such operation, by either id."""
    for kind in (cp.GetOperationRequest, cp.WatchOperationRequest, cp.CancelOperationRequest):
        for name in ("operation_id", "request_id"):
            server.refused(kind(**{name: NOBODY}), NOT_FOUND, "OPERATION_NOT_FOUND")


@promise(trains=False)
def unknown_datasets_are_not_found(server: Server) -> None:
    """NOT_FOUND (DATASET_NOT_FOUND): no such dataset."""
    for kind in (dataset_pb2.GetDatasetRequest, dataset_pb2.DeleteDatasetRequest):
        server.refused(kind(dataset_id=NOBODY), NOT_FOUND, "DATASET_NOT_FOUND")


@promise()
def what_a_run_names_is_looked_for(server: Server) -> None:
    """A run of a dataset that is not there is NOT_FOUND (DATASET_NOT_FOUND)."""
    request = pb.ValidateRunRequest(spec=server.spec(dataset_id="0" * 32))
    server.refused(request, NOT_FOUND, "DATASET_NOT_FOUND")


@promise()
def unknown_snapshots_are_not_found(server: Server) -> None:
    """NOT_FOUND (SNAPSHOT_NOT_FOUND): no such snapshot."""
    request = cp.GetSnapshotRequest(snapshot_id=NOBODY)
    server.refused(request, NOT_FOUND, "SNAPSHOT_NOT_FOUND")


@promise(trains=False)
def the_resource_is_named(server: Server) -> None:
    """Errors carry ResourceInfo with what the error is about."""
    found = server.refused(pb.GetRunRequest(run_id=NOBODY), NOT_FOUND)
    require_equal(found.resource, NOBODY, "the name in ResourceInfo")


@promise(trains=False)
def missing_fields_are_named(server: Server) -> None:
    """INVALID_ARGUMENT: BadRequest has the path of each field that is missing."""
    for request, field in (
        (pb.GetRunRequest(), "run_id"),
        (pb.WatchRunRequest(), "run_id"),
        (pb.CancelRunRequest(), "run_id"),
        (pb.DeleteRunRequest(), "run_id"),
        (pb.TrainRequest(), "spec"),
        (pb.CreateRunRequest(), "spec"),
        (pb.ValidateRunRequest(), "spec"),
        (dataset_pb2.GetDatasetRequest(), "dataset_id"),
        (dataset_pb2.DeleteDatasetRequest(), "dataset_id"),
    ):
        server.refused(request, INVALID, fields=[field])
    server.refused(cp.GetOperationRequest(), INVALID)
    server.refused(cp.GetOperationRequest(operation_id="a", request_id="b"), INVALID)


@promise(trains=False)
def wrong_fields_are_named(server: Server) -> None:
    """INVALID_ARGUMENT: BadRequest has the path of each wrong field."""
    for request, *fields in (
        (pb.GetRunRequest(run_id=NOBODY, view=UNKNOWN), "view"),
        (pb.WatchRunRequest(run_id=NOBODY, after_sequence=-1), "after_sequence"),
        (pb.WatchRunsRequest(after_revision=-1), "after_revision"),
        (pb.ListRunsRequest(page_size=-1, order=UNKNOWN), "page_size", "order"),
        (pb.ListRunsRequest(states=[pb.RUN_STATE_QUEUED, UNKNOWN]), "states[1]"),
        (pb.ListRunsRequest(page_token="?"), "page_token"),
        (pb.CreateRunRequest(spec=pb.RunSpec(), request_id=TOO_LONG), "request_id"),
        (cp.ListOperationsRequest(page_size=-1), "page_size"),
        (cp.ListOperationsRequest(states=[UNKNOWN]), "states[0]"),
        (cp.ListOperationsRequest(page_token="?"), "page_token"),
        (cp.SyncRequest(method=cp.SYNC_METHOD_UNCHANGED), "method"),
        (cp.UndoRequest(updates=-1), "updates"),
        (cp.ExportRequest(directory="relative"), "directory"),
        (cp.AdoptRequest(directory="relative"), "directory"),
        (dataset_pb2.ListDatasetsRequest(page_size=-1), "page_size"),
        (dataset_pb2.ListDatasetsRequest(page_token="?"), "page_token"),
    ):
        found = server.refused(request, INVALID)
        require_equal(sorted(found.fields), sorted(fields), f"wrong fields of {request}")


@promise()
def wrong_specs_are_refused_at_each_field(server: Server) -> None:
    """INVALID_ARGUMENT: the spec is wrong; each wrong field is named, of all samples."""
    unknown = pb.TokenSample(context_ids=[1], continuation_ids=[2, server.info.model.vocabulary])
    options = pb.OptimizerConfig(lr=-1, eps=0)
    for fields, wrong in (
        (
            {"samples": [sample(1), pb.Sample(tokens=unknown), pb.Sample()]},
            ["samples[1].tokens.continuation_ids[1]", "samples[2]"],
        ),
        ({"optimizer": options}, ["optimizer.lr", "optimizer.eps"]),
        ({"guard": pb.Guard(max_grad_norm=-1)}, ["guard.max_grad_norm"]),
        ({"epochs": -1}, ["epochs"]),
        ({"name": TOO_LONG}, ["name"]),
        ({"labels": {"a": TOO_LONG}}, ["labels"]),
        ({"samples": []}, ["samples"]),
    ):
        paths = [f"spec.{path}" for path in wrong]
        spec = server.spec(**fields)
        server.refused(pb.CreateRunRequest(spec=spec), INVALID, fields=paths)


@promise()
def samples_that_are_too_long_are_refused(server: Server) -> None:
    """INVALID_ARGUMENT: a sample is longer than the served model takes."""
    long = sample(1, server.info.model.max_length)
    long.tokens.continuation_ids[:] = [4] * server.info.model.max_length
    found = server.refused(pb.CreateRunRequest(spec=server.spec(samples=[long])), INVALID)
    require(
        found.fields and all(f.startswith("spec.samples[0]") for f in found.fields),
        f"wrong fields {found.fields}",
    )


@promise()
def sequences_beyond_the_end_are_out_of_range(server: Server) -> None:
    """OUT_OF_RANGE (BEYOND_THE_END): the run has ended before that sequence."""
    last = server.ended[-1]
    request = pb.WatchRunRequest(run_id=last.run_id, after_sequence=last.sequence + 1)
    server.refused(request, OUT_OF_RANGE, "BEYOND_THE_END")


@promise(trains=False)
def revisions_beyond_the_newest_are_out_of_range(server: Server) -> None:
    """OUT_OF_RANGE (BEYOND_THE_END, with `newest_revision`): it was not given yet."""
    found = server.refused(pb.WatchRunsRequest(after_revision=FAR), OUT_OF_RANGE, "BEYOND_THE_END")
    newest = found.metadata.get("newest_revision", "")
    require(newest.isdecimal(), f"metadata {found.metadata}")

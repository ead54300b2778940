"""How runs are begun, asked for again, left, cancelled and deleted."""

from __future__ import annotations

import grpc

from apollo_client.conformance.promises import promise
from apollo_client.conformance.requirements import require, require_equal
from apollo_client.conformance.server import LABEL, Server, finished, started, steps_of
from apollo_grpc.v1 import training_pb2 as pb

ENDED = (
    pb.RUN_STATE_SUCCEEDED,
    pb.RUN_STATE_FAILED,
    pb.RUN_STATE_CANCELLED,
    pb.RUN_STATE_REJECTED,
)


@promise()
def a_run_is_created_at_once(server: Server) -> None:
    """CreateRun accepts a run, as Train, and returns it at once, as in RUN_VIEW_BASIC."""
    request_id, name = server.name(), server.name()
    run = server.create(request_id, name=name)
    require(run.run_id, "no run_id")
    require_equal((run.request_id, run.spec.name), (request_id, name), "request_id and name")
    require_equal(dict(run.spec.labels), {LABEL: server.tag}, "labels")
    require(not run.spec.samples, "samples in RUN_VIEW_BASIC")
    require_equal(finished(server.events(run.run_id)).state, pb.RUN_STATE_SUCCEEDED, "its end")


@promise()
def the_same_request_is_the_same_run(server: Server) -> None:
    """The same id with the same spec attaches to the first run, by Train and by CreateRun."""
    request_id = server.name()
    events = server.train(request_id)
    require(server.train(request_id) == events, "other events for the same request of Train")
    run_id = server.create(request_id).run_id
    require_equal(run_id, events[0].run_id, "run_id of the same request of CreateRun")


@promise()
def another_spec_is_another_request(server: Server) -> None:
    """With another spec a request id is ALREADY_EXISTS (REQUEST_ID_TAKEN), by either call."""
    request_id = server.name()
    run_id = server.create(request_id).run_id
    other = server.spec(epochs=3)
    for kind in (pb.TrainRequest, pb.CreateRunRequest):
        found = server.refused(
            kind(request_id=request_id, spec=other),
            grpc.StatusCode.ALREADY_EXISTS,
            "REQUEST_ID_TAKEN",
        )
        require_equal(found.resource, run_id, "the name in ResourceInfo")


@promise()
def without_a_request_id_each_run_is_new(server: Server) -> None:
    """An empty `request_id` is a new run each time."""
    require(server.create().run_id != server.create().run_id, "the same run twice")


@promise()
def a_caller_that_leaves_stops_no_run(server: Server) -> None:
    """The run outlives the stream: a caller that goes away does not stop it."""
    events = server.begin(server.spec(epochs=3))
    run_id = next(events).run_id
    events.close()
    told = server.events(run_id)
    require_equal(finished(told).state, pb.RUN_STATE_SUCCEEDED, "the state")
    require_equal(len(steps_of(told)), started(told).steps_total, "steps that were taken")


@promise()
def a_run_is_cancelled(server: Server) -> None:
    """CancelRun asks a run to stop, and it ends as CANCELLED."""
    with server.long() as run_id:
        server.ask(pb.CancelRunRequest(run_id=run_id))
        require_equal(finished(server.events(run_id)).state, pb.RUN_STATE_CANCELLED, "the state")


@promise()
def a_run_that_waits_is_cancelled(server: Server) -> None:
    """One run owns the model at a time; one that waits in the queue can be cancelled too."""
    with server.long():
        waiting = server.create()
        require_equal(waiting.state, pb.RUN_STATE_QUEUED, "the state behind another run")
        ended = server.end(waiting.run_id)
    require_equal(finished(ended).state, pb.RUN_STATE_CANCELLED, "the state")
    require(not steps_of(ended), "steps of a run that was cancelled as it waited")


@promise()
def cancelling_is_idempotent(server: Server) -> None:
    """CancelRun is idempotent: a run that has ended stays as it ended."""
    run_id = server.ended[0].run_id
    before = server.run(run_id)
    for _ in range(2):
        require_equal(server.ask(pb.CancelRunRequest(run_id=run_id)).run, before, "the run")


@promise()
def a_run_that_has_not_ended_is_not_deleted(server: Server) -> None:
    """FAILED_PRECONDITION (RUN_NOT_ENDED): it waits or runs."""
    refusal = grpc.StatusCode.FAILED_PRECONDITION, "RUN_NOT_ENDED"
    with server.long() as run_id:
        for each in (run_id, server.create().run_id):
            server.refused(pb.DeleteRunRequest(run_id=each), *refusal)


@promise()
def a_deleted_run_is_gone(server: Server) -> None:
    """DeleteRun deletes a run that has ended, its spec, samples and events: it is not found."""
    run_id = server.train()[0].run_id
    server.ask(pb.DeleteRunRequest(run_id=run_id))
    for kind in (pb.GetRunRequest, pb.WatchRunRequest, pb.DeleteRunRequest):
        server.refused(kind(run_id=run_id), grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")
    listed = server.ask(pb.ListRunsRequest(labels={LABEL: server.tag}, page_size=1000)).runs
    require(run_id not in {run.run_id for run in listed}, "ListRuns lists it")


@promise()
def the_request_id_of_a_deleted_run_is_free(server: Server) -> None:
    """The request id of a deleted run is free again, also for another spec."""
    request_id = server.name()
    run_id = server.train(request_id)[0].run_id
    server.ask(pb.DeleteRunRequest(run_id=run_id))
    require(server.create(request_id, epochs=3).run_id != run_id, "the deleted run's id")

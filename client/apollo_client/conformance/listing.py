"""What GetRun and ListRuns say of runs."""

from __future__ import annotations

from typing import Any

from apollo_client.conformance.promises import promise
from apollo_client.conformance.requirements import require, require_equal, shown
from apollo_client.conformance.server import LABEL, Server, finished, sample, steps_of
from apollo_grpc.v1 import training_pb2 as pb

KIND = f"{LABEL}-kind"
OLDEST = pb.RUN_ORDER_OLDEST_FIRST


@promise()
def a_run_holds_what_its_events_said(server: Server) -> None:
    """A Run has the state, steps, sequence, loss and weight version of its events, and times."""
    events = server.ended
    run, ended = server.run(events[0].run_id), finished(events)
    require_equal(run.state, ended.state, "state")
    require_equal(run.steps_done, ended.steps_done, "steps_done")
    require_equal(run.steps_total, 4, "steps_total")
    require_equal(run.last_sequence, events[-1].sequence, "last_sequence")
    require_equal(run.last_loss, steps_of(events)[-1].loss, "last_loss")
    require_equal(run.weight_version, ended.weight_version, "weight_version")
    times = [t.ToNanoseconds() for t in (run.create_time, run.start_time, run.end_time)]
    require(0 < times[0] <= times[1] <= times[2], f"created, started, ended at {times}")


@promise()
def the_full_view_has_the_whole_spec(server: Server) -> None:
    """RUN_VIEW_FULL is the whole spec; RUN_VIEW_BASIC has no samples, anchors or probes."""
    probe = pb.Probe(name="p", sample=sample(3), check=pb.PROBE_CHECK_LOG_PROBABILITY)
    held: dict[str, Any] = {
        "evaluation_samples": [sample(4)],
        "anchors": pb.Anchors(samples=[sample(5)], weight=0.5),
        "probes": [probe],
    }
    spec = server.spec(**held)
    run_id = server.train(**held)[0].run_id
    require_equal(server.run(run_id, pb.RUN_VIEW_FULL).spec, spec, "the spec, FULL")
    del spec.samples[:], spec.evaluation_samples[:], spec.anchors.samples[:], spec.probes[:]
    require_equal(server.run(run_id, pb.RUN_VIEW_BASIC).spec, spec, "the spec, BASIC")
    require_equal(server.run(run_id, pb.RUN_VIEW_UNSPECIFIED).spec, spec, "the spec, unset")


@promise()
def pages_of_runs_join_to_the_whole(server: Server) -> None:
    """ListRuns lists newest first unless asked otherwise; its pages join to the whole."""
    kind = server.name()
    made = [server.create(labels={KIND: kind}).run_id for _ in range(5)]
    server.events(made[-1])
    found = _listed(server, labels={KIND: kind}, page_size=2)
    require_equal(found, made[::-1], "runs in pages of 2, newest first")
    found = _listed(server, labels={KIND: kind}, page_size=2, order=OLDEST)
    require_equal(found, made, "runs in pages of 2, oldest first")
    page = server.ask(pb.ListRunsRequest(labels={KIND: kind}, page_size=2))
    require_equal(len(page.runs), 2, "runs of a page of 2")
    require(not any(run.spec.samples for run in page.runs), "samples in ListRuns")
    require_equal(page.runs[0], server.run(made[-1]), "a run in ListRuns and in GetRun")


@promise()
def runs_are_filtered(server: Server) -> None:
    """ListRuns lists only runs that have all of the labels, the name, and one of the states."""
    kind, name = server.name(), server.name()
    one = server.train(labels={KIND: kind, "other": "x"}, name=name)[0].run_id
    two = server.train(labels={KIND: kind})[0].run_id
    with server.long(labels={KIND: kind}) as three:
        for fields, expected in (
            ({"labels": {KIND: kind}}, [three, two, one]),
            ({"labels": {KIND: kind, "other": "x"}}, [one]),
            ({"labels": {KIND: kind, "other": ""}}, []),
            ({"name": name}, [one]),
            ({"labels": {KIND: kind}, "name": name[:-1]}, []),
            ({"labels": {KIND: kind}, "states": [pb.RUN_STATE_RUNNING]}, [three]),
            ({"labels": {KIND: kind}, "states": [pb.RUN_STATE_SUCCEEDED]}, [two, one]),
            ({"labels": {KIND: kind}, "states": [pb.RUN_STATE_REJECTED]}, []),
        ):
            require_equal(_listed(server, **fields), expected, f"runs by {shown(fields)}")


def _listed(server: Server, **fields: Any) -> list[str]:
    """Ids of all runs of a choice, page by page."""
    found, token = list[str](), ""
    while True:
        page = server.ask(pb.ListRunsRequest(page_token=token, **fields))
        require(page.runs or not page.next_page_token, "an empty page that is not the last")
        found += [run.run_id for run in page.runs]
        if not (token := page.next_page_token):
            return found

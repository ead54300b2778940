"""Runs over a real channel, after their start: found again, followed, listed, cancelled."""

from __future__ import annotations

from typing import Any

import pytest

from apollo_grpc.errors import AlreadyExists, InvalidArgument, NotFound, OutOfRange, Resource
from apollo_grpc.v1 import training_pb2 as pb


def first(stream: Any, kind: str) -> pb.RunEvent:
    """The next event of a kind; the stream goes on."""
    return next(answer.event for answer in stream if answer.event.HasField(kind))


def test_a_request_sent_twice_is_one_run_with_the_same_events(caller: Any) -> None:
    sent = caller.train("mine", epochs=4)
    assert caller.train("mine", epochs=4) == sent
    assert len(caller.list().runs) == 1
    assert caller.status().optimizer_step == 4


def test_a_request_sent_again_in_mid_run_attaches_from_the_first_event(caller: Any) -> None:
    stream = caller.start("mine", epochs=60)
    first(stream, "step")
    again = caller.train("mine", epochs=60)
    assert [event.sequence for event in again] == list(range(1, len(again) + 1))
    assert again[-1].finished.steps_done == 60


def test_a_request_id_with_another_spec_is_refused_and_nothing_begins(
    caller: Any, error_of: Any
) -> None:
    run_id = caller.train("mine")[0].run_id
    error = error_of(caller.start("mine", epochs=2))
    assert isinstance(error, AlreadyExists)
    assert (error.reason, error.metadata) == ("REQUEST_ID_TAKEN", {"run_id": run_id})
    assert error.resource == Resource("run", run_id)
    assert len(caller.list().runs) == 1


def test_without_a_request_id_each_call_is_a_run(caller: Any) -> None:
    assert caller.train()[0].run_id != caller.train()[0].run_id


def test_after_a_restart_ids_requests_and_events_are_still_known(
    caller: Any, start_server: Any, error_of: Any
) -> None:
    sent = caller.train("mine", epochs=3)
    run = caller.run(sent[0].run_id)
    caller.stop()
    again = start_server()
    # Also before an engine is attached: the run is known, whatever else is not.
    assert again.train("mine", epochs=3) == sent
    assert isinstance(error_of(again.start("mine", epochs=4)), AlreadyExists)
    assert again.events_of(sent[0].run_id, after=3) == sent[3:]
    assert again.run(sent[0].run_id) == run


def test_a_run_that_waits_when_the_server_stops_is_executed_by_the_next_one(
    caller: Any, start_server: Any
) -> None:
    active = caller.start(epochs=100_000)
    first(active, "step")
    # One after the other: two calls that are on their way at once arrive in any order.
    ids = [first(caller.start(f"waiting {n}"), "queued").run_id for n in range(3)]
    caller.stop()
    again = start_server()
    ended = [again.events_of(run_id) for run_id in ids]
    assert [e[-1].finished.state for e in ended] == [pb.RUN_STATE_SUCCEEDED] * 3
    steps = [e.step.optimizer_step for run in ended for e in run if e.HasField("step")]
    assert steps == [steps[0], steps[0] + 1, steps[0] + 2]


def test_a_run_says_what_it_is_and_how_far_it_came(caller: Any) -> None:
    events = caller.train("mine", epochs=3, seed=5)
    run = caller.run(events[0].run_id, pb.RUN_VIEW_FULL)
    assert (run.state, run.steps_done, run.steps_total) == (pb.RUN_STATE_SUCCEEDED, 3, 3)
    last = [event.step for event in events if event.HasField("step")][-1]
    assert (run.request_id, run.last_loss) == ("mine", last.loss)
    assert run.weight_version == events[-1].finished.weight_version
    assert run.last_sequence == len(events)
    assert (run.spec.epochs, run.spec.seed, len(run.spec.samples)) == (3, 5, 1)
    times = [run.create_time, run.start_time, run.end_time]
    assert [t.ToNanoseconds() for t in times] == sorted(t.ToNanoseconds() for t in times)
    assert run.end_time == events[-1].event_time


def test_pages_hold_every_run_once_newest_first(caller: Any) -> None:
    ids = [caller.train()[0].run_id for _ in range(7)]
    listed, token = [], ""
    while True:
        page = caller.list(page_size=3, page_token=token)
        listed += [run.run_id for run in page.runs]
        assert all(not run.spec.samples for run in page.runs)
        if not (token := page.next_page_token):
            break
    assert listed == ids[::-1]


def test_runs_are_listed_by_state(caller: Any) -> None:
    caller.train()
    active = caller.start(epochs=100_000)
    run_id = first(active, "step").run_id
    assert [r.run_id for r in caller.list(states=[pb.RUN_STATE_RUNNING]).runs] == [run_id]
    caller.cancel(run_id)
    caller.events_of(run_id)
    ended = [pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_CANCELLED]
    assert len(caller.list(states=ended).runs) == 2
    assert not caller.list(states=[pb.RUN_STATE_FAILED]).runs


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"page_size": -1}, "page_size"),
        ({"page_token": "rubbish"}, "page_token"),
        ({"page_token": "AAAA"}, "page_token"),
        ({"states": [0]}, "states[0]"),
        ({"states": [pb.RUN_STATE_FAILED, 99]}, "states[1]"),
    ],
)
def test_a_page_that_is_none_is_refused_at_its_field(
    start_server: Any, error_of: Any, fields: dict[str, Any], path: str
) -> None:
    caller = start_server()
    error = error_of(lambda: caller.list(**fields))
    assert isinstance(error, InvalidArgument)
    assert [v.field for v in error.violations] == [path]


def test_a_token_is_of_its_states_alone(caller: Any, error_of: Any) -> None:
    caller.train(), caller.train()
    token = caller.list(page_size=1).next_page_token
    error = error_of(lambda: caller.list(page_token=token, states=[pb.RUN_STATE_SUCCEEDED]))
    assert [v.field for v in error.violations] == ["page_token"]


def test_an_unknown_run_is_not_found(start_server: Any, error_of: Any) -> None:
    caller = start_server()
    for call in (caller.events_of, caller.run, caller.cancel):
        error = error_of(lambda call=call: call("none"))
        assert isinstance(error, NotFound)
        assert error.resource == Resource("run", "none")
        assert isinstance(error_of(lambda call=call: call("")), InvalidArgument)


def test_a_sequence_is_followed_from_where_it_is_asked_for(caller: Any, error_of: Any) -> None:
    sent = caller.train(epochs=5)
    run_id = sent[0].run_id
    assert caller.events_of(run_id, after=4) == sent[4:]
    assert caller.events_of(run_id, after=len(sent)) == []
    beyond = error_of(lambda: caller.events_of(run_id, after=len(sent) + 1))
    assert isinstance(beyond, OutOfRange)
    assert isinstance(error_of(lambda: caller.events_of(run_id, after=-1)), InvalidArgument)


def test_an_active_run_is_cancelled_between_steps_and_keeps_what_it_learned(caller: Any) -> None:
    stream = caller.start(epochs=100_000)
    run_id = first(stream, "step").run_id
    assert caller.cancel(run_id).run_id == run_id
    finished = caller.events_of(run_id)[-1].finished
    assert finished.state == pb.RUN_STATE_CANCELLED
    assert 0 < finished.steps_done < 100_000
    assert not finished.HasField("failure")
    assert caller.status().optimizer_step == finished.steps_done
    assert caller.cancel(run_id).state == pb.RUN_STATE_CANCELLED


def test_a_waiting_run_is_cancelled_at_once_and_the_others_keep_their_order(caller: Any) -> None:
    active = caller.start(epochs=100_000)
    active_id = first(active, "step").run_id
    ids = [first(caller.start(), "queued").run_id for _ in range(3)]
    assert caller.cancel(ids[1]).state == pb.RUN_STATE_CANCELLED
    kinds = [event.WhichOneof("event") for event in caller.events_of(ids[1])]
    assert kinds == ["queued", "finished"]
    assert caller.status().queue_length == 2
    caller.cancel(active_id)
    ended = [caller.events_of(run_id)[-1] for run_id in (ids[0], ids[2])]
    assert [e.finished.state for e in ended] == [pb.RUN_STATE_SUCCEEDED] * 2
    assert ended[0].event_time.ToNanoseconds() < ended[1].event_time.ToNanoseconds()


def test_a_run_that_has_ended_is_not_cancelled_any_more(caller: Any) -> None:
    run_id = caller.train()[0].run_id
    assert caller.cancel(run_id).state == pb.RUN_STATE_SUCCEEDED


def test_a_run_ends_with_its_wall_time(caller: Any) -> None:
    from google.protobuf.duration_pb2 import Duration

    events = caller.train(epochs=100_000, max_wall_time=Duration(nanos=300_000_000))
    finished = events[-1].finished
    assert finished.failure.reason == "DEADLINE"
    assert finished.steps_done > 0
    seconds = (events[-1].event_time.ToNanoseconds() - events[1].event_time.ToNanoseconds()) / 1e9
    assert 0.2 < seconds < 3
    assert "0.3 s" in finished.failure.message
    assert caller.run(events[0].run_id).failure == finished.failure


def test_64_clients_at_once_all_get_their_runs_in_order(start_server: Any, start_engine: Any):
    start_engine()
    caller = start_server(max_queued_runs=64)
    caller.wait_attached()
    streams = [caller.start(f"client {n}") for n in range(64)]
    runs = [[answer.event for answer in stream] for stream in streams]
    for events in runs:
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    began = {run.run_id: run.start_time.ToNanoseconds() for run in caller.list(page_size=64).runs}
    assert list(began.values()) == sorted(began.values(), reverse=True)
    steps = sorted(e.step.optimizer_step for run in runs for e in run if e.HasField("step"))
    assert steps == list(range(1, 65))

"""Both clients, over real sockets: the same calls, the same answers, the same errors."""

from __future__ import annotations

import threading
import uuid

import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import AlreadyExists, Cancelled, InvalidArgument, NotFound, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import wait_until

SAMPLE = ("The sea is", " deep.")


def steps(events) -> list[pb.Step]:
    return [event.step for event in events if event.HasField("step")]


def test_a_run_tells_every_step_and_ends_with_finished(connect, server):
    events = connect(server).train([SAMPLE, SAMPLE], epochs=3, lr=1e-3)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [step.step for step in steps(events)] == [1, 2, 3, 4, 5, 6]
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_options_reach_the_run(connect, server):
    options = {"lr": 3e-4, "samples_per_step": 2, "epochs": 2, "warmup_steps": 2, "seed": 1}
    told = steps(connect(server).train([SAMPLE] * 4, **options))
    assert [step.learning_rate for step in told] == pytest.approx([1.5e-4, 3e-4, 3e-4, 3e-4])


def test_a_run_goes_on_when_its_caller_leaves(connect, server):
    client = connect(server)
    first = client.begin([SAMPLE], epochs=30)
    wait_until(lambda: not client.call("status").active_run_id, "the end of the run")
    assert client.call("status").optimizer_step == first.optimizer_step + 29


def test_a_subscriber_gets_every_step_of_somebody_elses_run(connect, server):
    told: list[pb.RunEvent] = []

    def somebody_trains() -> None:
        with ApolloClient(server) as other:
            told.extend(other.train([SAMPLE], epochs=4))

    updates = connect(server).watch_until(
        lambda update: told and update.event == told[-1], somebody_trains
    )
    assert updates[0].status.model
    seen = [update.event for update in updates if update.event.run_id == told[0].run_id]
    assert seen == told


def test_sync_tells_its_progress_and_its_result(connect, server):
    client, told = connect(server), []
    client.train([SAMPLE], lr=1e-2)
    result = client.call("sync", told.append)
    assert (result.files_written, told[-1].bytes_done) == (
        ["model.safetensors"],
        told[-1].bytes_total,
    )


def test_the_same_request_is_the_same_run(connect, server):
    client, request_id = connect(server), uuid.uuid4().hex
    events = client.train([SAMPLE], epochs=2, request_id=request_id)
    assert client.train([SAMPLE], epochs=2, request_id=request_id) == events
    with pytest.raises(AlreadyExists):
        client.train([SAMPLE], epochs=3, request_id=request_id)


def test_without_an_id_of_the_callers_each_run_is_its_own(connect, server):
    client = connect(server)
    assert client.train([SAMPLE])[0].run_id != client.train([SAMPLE])[0].run_id


def test_a_run_is_found_again(connect, server):
    client = connect(server)
    events = client.train([SAMPLE], epochs=4)
    run_id = events[0].run_id
    assert client.follow(run_id) == events
    assert client.follow(run_id, 3) == events[3:]
    run = client.call("get_run", run_id)
    assert (run.run_id, run.steps_done, run.spec.epochs) == (run_id, 4, 4)
    page = client.call("list_runs", 1, "", ["succeeded"])
    assert [found.run_id for found in page.runs] == [run_id]
    assert client.call("list_runs", 1, page.next_page_token, ["succeeded"]).runs[0] != page.runs[0]


def test_a_run_is_cancelled(connect, server):
    client = connect(server)
    request_id = uuid.uuid4().hex
    client.begin([SAMPLE], epochs=100_000, request_id=request_id)
    (run,) = client.call("list_runs", 1, "", ["running"]).runs
    client.call("cancel_run", run.run_id)
    *_, last = client.follow(run.run_id)
    assert last.finished.state == pb.RUN_STATE_CANCELLED


def test_an_unknown_run_and_an_unknown_state_are_told(connect, server):
    client = connect(server)
    for call in (client.follow, lambda run_id: client.call("get_run", run_id)):
        with pytest.raises(NotFound):
            call("none")
    with pytest.raises(InvalidArgument, match="states"):
        client.call("list_runs", 0, "", ["lost"])


def test_a_refusal_names_the_field(connect, server):
    with pytest.raises(InvalidArgument) as refused:
        connect(server).train([("a", "b"), ("a", "")])
    (violation,) = refused.value.violations
    assert violation.field == "spec.samples[1].text.continuation"


def test_coherence_guards_and_limits_reach_the_run(connect, server):
    client = connect(server)
    options = {
        "coherence": "live",
        "cache_policy": "keep",
        "max_loss": 50.0,
        "max_wall_time": 60.5,
        "evaluate": True,
        "dry_run": True,
    }
    events = list(client.train([SAMPLE], **options))
    assert [e.evaluated.after_training for e in events if e.HasField("evaluated")] == [False, True]
    spec = client.call("get_run", events[0].run_id).spec
    assert spec.coherence.mode == pb.COHERENCE_MODE_LIVE
    assert spec.coherence.cache_policy == pb.CACHE_POLICY_KEEP
    assert (spec.guard.max_loss, spec.max_wall_time.ToMilliseconds()) == (50.0, 60500)
    assert spec.dry_run and spec.evaluate


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lrr": 1.0}, "lrr"),
        ({"epochs": "three"}, "epochs"),
        ({"coherence": "paused"}, "coherence"),
        ({"cache_policy": 3}, "cache_policy"),
        ({"max_wall_time": float("nan")}, "max_wall_time"),
    ],
)
def test_an_option_that_no_run_has_is_refused_before_a_call(connect, options, field):
    with pytest.raises(InvalidArgument) as refused:
        connect("unix:/nowhere/training.sock").train([SAMPLE], **options)
    assert refused.value.violations[0].field == field


@pytest.mark.parametrize("call", ["status", "sync"])
def test_without_a_server_the_error_says_what_to_start(connect, state_dir, call):
    address = f"unix:{state_dir}/training.sock"
    with pytest.raises(Unavailable, match="apollo up") as error:
        connect(address).call(call)
    assert error.value.reason == "SERVER_UNREACHABLE"
    assert address in error.value.message


def test_a_stream_without_a_server_raises_the_same_error(connect, state_dir):
    with pytest.raises(Unavailable, match="apollo up"):
        connect(f"unix:{state_dir}/training.sock").train([SAMPLE])


def test_a_stream_that_was_left_ends(connect, server):
    client = connect(server)
    assert client.after_leaving() == []


def test_a_token_never_leaves_for_another_machine_in_the_clear(connect):
    with pytest.raises(InvalidArgument, match="TLS"):
        connect("192.0.2.1:50051", token="secret")


def test_a_job_that_waits_is_stopped_by_its_request_id(connect, server):
    with ApolloClient(server) as other:
        run = other.train([SAMPLE], epochs=100_000)
        run_id, request_id = next(run).run_id, uuid.uuid4().hex
        wait_until(lambda: other.status().active_run_id == run_id, "the run")

        def stop() -> None:
            wait_until(lambda: _stopped(other, request_id), "the job")

        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(Cancelled) as caught:
            connect(server).call("sync", request_id=request_id)
        stopper.join()
        assert caught.value.reason == "JOB_CANCELLED"
        with pytest.raises(NotFound):
            other.cancel_checkpoint("unknown")
        other.cancel_run(run_id)


def _stopped(client: ApolloClient, request_id: str) -> bool:
    try:
        return client.cancel_checkpoint(request_id) == "CANCELLED"
    except NotFound:
        return False

"""A run's events over lost connections: none missing, none twice, and an end to the waiting."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client import ApolloClient
from apollo_client.resume import (
    LONGEST_WAIT_SECONDS,
    OperationEndurance,
    Patience,
    Resume,
    RunsResume,
)
from apollo_grpc.errors import (
    Aborted,
    DataLoss,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from tests.server_process import ServerProcess, served
from tests.services.test_operations import hold_flushes, in_state

SAMPLE = ("The sea is", " deep.")
# How long a killed server is away; five seconds were tried by hand.
AWAY_SECONDS = float(os.environ.get("AWAY_SECONDS", "0.5"))
LOST = Unavailable("gone", reason="SERVER_UNREACHABLE", metadata={"cause": "Socket closed"})
REFUSED = Unavailable(
    "none", reason="SERVER_UNREACHABLE", metadata={"cause": "failed to connect to all addresses"}
)
FULL = ResourceExhausted("full", reason="TOO_MANY_STREAMS", retry_seconds=1.0)
NO_ENGINE = Unavailable("no engine", reason="ENGINE_NOT_ATTACHED")


def event(sequence: int) -> pb.RunEvent:
    return pb.RunEvent(run_id="r", sequence=sequence)


def resume(seconds: float = 60.0) -> Resume:
    return Resume(pb.TrainRequest(request_id="q"), seconds)


@given(st.lists(st.integers(1, 8), max_size=12))
def test_whatever_is_sent_again_is_taken_once_and_in_order(rewinds: list[int]) -> None:
    state, taken = resume(), []
    for start in [1, *rewinds, 1]:
        # A server sends from any event that it has sent before, or from the next one.
        for sequence in range(min(start, len(taken) + 1), len(taken) + 3):
            if state.take(event(sequence)):
                taken.append(sequence)
    assert taken == list(range(1, len(taken) + 1))


@given(st.none() | st.just(0), st.lists(st.integers(1, 8), max_size=12))
def test_whatever_of_all_runs_is_sent_again_is_taken_once_and_in_order(
    after: int | None, rewinds: list[int]
) -> None:
    state, taken = RunsResume(after, 60.0), list[int]()
    for start in [1, *rewinds, 1]:
        # What is skipped was deleted.
        for revision in range(3 * min(start, len(taken) + 1), 3 * (len(taken) + 3), 3):
            if state.take(pb.WatchRunsResponse(revision=revision, event=event(1))):
                taken.append(revision)
    assert taken == [3 * n for n in range(1, len(taken) + 1)]


def asked_of(state: RunsResume) -> pb.WatchRunsRequest:
    """What it asks now."""
    stub = SimpleNamespace(WatchRuns="the method")
    asked: pb.WatchRunsRequest = state.call(lambda method, request: request, stub)
    return asked


def test_a_reader_of_all_runs_asks_for_what_comes_after_the_last_revision() -> None:
    state = RunsResume(None, 60.0)
    assert not asked_of(state).HasField("after_revision")
    # Where it began is told once; also where that was the beginning of all.
    assert state.take(pb.WatchRunsResponse(revision=0))
    assert asked_of(state) == pb.WatchRunsRequest(after_revision=0)
    assert state.take(pb.WatchRunsResponse(revision=7, event=event(1)))
    assert not state.take(pb.WatchRunsResponse(revision=7))
    assert not state.take(pb.WatchRunsResponse(revision=9))
    assert asked_of(state) == pb.WatchRunsRequest(after_revision=9)
    assert state.wait_after(LOST) > 0
    with pytest.raises(OutOfRange):
        state.wait_after(OutOfRange("pruned"))


def test_a_missing_event_is_no_silence() -> None:
    state = resume()
    state.take(event(1))
    with pytest.raises(DataLoss, match="2 to 3"):
        state.take(event(4))


def test_it_asks_for_the_run_once_it_knows_it_and_only_for_the_rest() -> None:
    state = resume()
    assert state.request() == pb.TrainRequest(request_id="q")
    state.take(event(1))
    state.take(event(2))
    assert state.request() == pb.WatchRunRequest(run_id="r", after_sequence=2)


@pytest.mark.parametrize("error", [REFUSED, NO_ENGINE, InvalidArgument("no"), NotFound("no")])
def test_a_first_call_that_cannot_be_is_no_reason_to_wait(error: Exception) -> None:
    with pytest.raises(type(error)):
        resume().wait_after(error)


def test_a_call_that_the_server_may_have_had_is_made_again_until_the_time_is_up() -> None:
    state = resume(seconds=0.3)
    waits = [state.wait_after(LOST)]
    with pytest.raises(Unavailable):
        while True:
            time.sleep(waits[-1])
            waits.append(state.wait_after(NO_ENGINE))
    assert all(0 < wait <= LONGEST_WAIT_SECONDS for wait in waits)
    assert sum(waits) < 0.4


def test_after_an_event_the_time_begins_anew() -> None:
    state = resume(seconds=0.2)
    state.wait_after(LOST)
    time.sleep(0.25)
    state.take(event(1))
    assert state.wait_after(LOST) > 0


def test_zero_seconds_is_no_retry() -> None:
    with pytest.raises(Unavailable):
        resume(seconds=0).wait_after(LOST)


def test_a_reader_who_comes_back_to_a_full_server_waits_as_long_as_it_says() -> None:
    state = resume()
    state.take(event(1))
    assert 0 < state.wait_after(LOST) <= 0.1
    assert all(0.5 <= state.wait_after(FULL) <= LONGEST_WAIT_SECONDS for _ in range(8))
    with pytest.raises(ResourceExhausted):
        resume(seconds=0).wait_after(FULL)


def test_a_limit_that_no_waiting_helps_against_is_told_at_once() -> None:
    with pytest.raises(ResourceExhausted):
        resume().wait_after(ResourceExhausted("the queue is full", reason="QUEUE_FULL"))


def test_a_stream_is_opened_again_before_its_first_message_alone() -> None:
    patience = Patience(60.0)
    assert patience.wait_after(FULL) > 0
    with pytest.raises(Unavailable):
        patience.wait_after(LOST)
    patience.heard()
    with pytest.raises(ResourceExhausted):
        patience.wait_after(FULL)


@pytest.fixture(scope="module")
def server_process(tiny_model: Path) -> Iterator[ServerProcess]:
    with served(tiny_model, APOLLO_LEASE_SECONDS="1") as server:
        yield server


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_reader_reads_on_when_the_server_is_back(
    connect, server_process: ServerProcess, number: signal.Signals
) -> None:
    server_process.wait_attached()

    def end_and_start() -> None:
        server_process.wait_for_steps(3)
        server_process.end(number)
        time.sleep(AWAY_SECONDS)
        server_process.start()

    killer = threading.Thread(target=end_and_start)
    killer.start()
    told = connect(server_process.address).train([SAMPLE], epochs=100_000, min_loss=0)
    killer.join()
    assert [e.sequence for e in told] == list(range(1, len(told) + 1))
    reason = {signal.SIGKILL: "INTERRUPTED", signal.SIGTERM: "SERVER_STOPPED"}[number]
    assert told[-1].finished.failure.reason == reason
    reached = server_process.wait_attached().optimizer_step
    steps = [e.step for e in told if e.HasField("step")]
    assert steps[-1].optimizer_step == reached
    assert steps[-1].step == told[-1].finished.steps_done


def test_a_result_has_every_step_also_of_a_run_that_lost_its_server(
    connect, server_process: ServerProcess
) -> None:
    server_process.wait_attached()

    def end_and_start() -> None:
        server_process.wait_for_steps(3)
        server_process.end(signal.SIGKILL)
        time.sleep(AWAY_SECONDS)
        server_process.start()

    killer = threading.Thread(target=end_and_start)
    killer.start()
    client = connect(server_process.address)
    run_id, _, result = client.read(1, "train", [SAMPLE], epochs=100_000, min_loss=0)
    killer.join()
    steps = [event.step for event in client.follow(run_id) if event.HasField("step")]
    assert result.losses == [step.loss for step in steps] and len(steps) == result.steps >= 3
    with pytest.raises(Aborted) as raised:
        result.raise_for_failure()
    assert raised.value.reason == "INTERRUPTED"


@pytest.mark.parametrize("call", ["sync", "restore"])
def test_an_operation_has_its_result_when_the_server_is_back(
    connect, model_folder: Path, tmp_path: Path, call: str
) -> None:
    held = tmp_path / "held"
    with (
        served(model_folder, hold_flushes, HELD=str(held), APOLLO_LEASE_SECONDS="1") as server,
        ApolloClient(server.address) as other,
    ):
        client = connect(server.address)
        client.call("create_snapshot", "one")
        client.train([SAMPLE])
        held.touch()
        told: list[str] = []

        def end_and_start() -> None:
            told.append(in_state(other, "running").operation_id)
            server.end(signal.SIGKILL)
            held.unlink()
            time.sleep(AWAY_SECONDS)
            server.start()

        killer = threading.Thread(target=end_and_start)
        killer.start()
        result = client.call(call, *(["one"] if call == "restore" else []))
        killer.join()
        ended = other.operation(told[0])
        assert ended.state == cp.OPERATION_STATE_SUCCEEDED
        assert getattr(ended, call) == result


def test_an_operation_that_no_engine_takes_is_not_asked_for_again() -> None:
    patience = OperationEndurance(60.0)
    with pytest.raises(Unavailable):
        patience.wait_after(NO_ENGINE)
    patience.heard()
    assert patience.wait_after(LOST) > 0
    assert patience.wait_after(NO_ENGINE) > 0
    patience.heard()
    with pytest.raises(Unavailable):
        patience.wait_after(NO_ENGINE)
    with pytest.raises(Unavailable):
        patience.wait_after(Unavailable("vLLM is gone", reason="ENGINE_LOST"))

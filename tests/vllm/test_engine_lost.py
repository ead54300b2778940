"""vLLM and the training server come and go; each one survives the other."""

from __future__ import annotations

import os
import signal

import pytest

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG, at_most

pytestmark = pytest.mark.vllm
SAMPLE = {"context_ids": list(range(70, 100)), "continuation_ids": list(range(100, 130))}
DETACHED = status_pb2.ATTACHMENT_STATE_DETACHED


def steps_of(events: list[pb.RunEvent]) -> list[pb.RunEvent.Step]:
    return [event.step for event in events if event.HasField("step")]


def read_steps(stream, count: int) -> list[pb.RunEvent]:
    events = []
    while len(steps_of(events)) < count:
        events.append(next(stream))
    return events


def test_a_run_whose_engine_is_killed_fails_with_a_reason_and_the_server_lives(qwen3):
    list(qwen3.client.train([SAMPLE]))
    epoch = qwen3.client.status().engine_epoch
    pid = qwen3.server.pid
    stream = qwen3.client.train([SAMPLE], epochs=5000, min_loss=0)
    events = read_steps(stream, 3)
    qwen3.end("vllm", signal.SIGKILL)
    events += stream
    finished = events[-1].finished
    assert finished.state == pb.RUN_STATE_FAILED
    assert finished.failure.reason == "ENGINE_LOST"
    assert 3 <= finished.steps_done < 5000

    qwen3.wait_for(lambda: qwen3.client.status().attachment == DETACHED, "the detachment")
    assert "apollo up" in qwen3.client.status().attachment_detail
    with pytest.raises(Unavailable, match="VLLM_PLUGINS=apollo") as refused:
        list(qwen3.client.train([SAMPLE]))
    assert refused.value.reason == "ENGINE_NOT_ATTACHED"

    qwen3.start_vllm()
    assert qwen3.wait_attached().engine_epoch != epoch
    assert (qwen3.server.pid, qwen3.server.poll()) == (pid, None)
    # The state on disk is of weights that went with the engine; it waits to be told.
    with pytest.raises(FailedPrecondition, match="accept_other_weights") as refused:
        list(qwen3.client.train([SAMPLE]))
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"
    *_, last = qwen3.client.train([SAMPLE], accept_other_weights=True)
    assert last.finished.state == pb.RUN_STATE_SUCCEEDED
    *_, last = qwen3.client.train([SAMPLE])
    assert last.finished.state == pb.RUN_STATE_SUCCEEDED


WEDGED = [
    ("api server", ""),
    ("engine core", ""),
    ("engine core", "pause_step"),
    pytest.param("api server", "pause_step", marks=pytest.mark.long),
    *(
        pytest.param(wedged, mode, marks=pytest.mark.long)
        for wedged in ("api server", "engine core")
        for mode in ("live", "pause_run")
    ),
]


@pytest.mark.parametrize(("wedged", "mode"), WEDGED, ids=lambda each: each or "idle")
def test_a_wedged_vllm_is_noticed_within_two_seconds_and_found_again(qwen3, wedged, mode):
    list(qwen3.client.train([SAMPLE], accept_other_weights=True))
    before = qwen3.client.status()
    how = {"epochs": 5000, "min_loss": 0, "coherence": mode}
    stream = qwen3.client.train([SAMPLE], **how) if mode else iter(())
    events = read_steps(stream, 3) if mode else []
    pid = qwen3.vllm_processes()[wedged]
    try:
        with at_most(2.5):
            with at_most(2.0):
                os.kill(pid, signal.SIGSTOP)
                qwen3.wait_for(
                    lambda: qwen3.client.status().attachment == DETACHED, "the detachment"
                )
            events += stream
    finally:
        os.kill(pid, signal.SIGCONT)
    status = qwen3.wait_attached()
    assert status.engine_epoch == before.engine_epoch
    if mode:
        finished = events[-1].finished
        assert finished.failure.reason == "ENGINE_LOST"
        # The same engine, with the same weights: the state in memory goes on.
        assert status.optimizer_step == before.optimizer_step + finished.steps_done
    assert qwen3.complete([70, 71])["choices"]

    def trains() -> bool:
        *_, last = qwen3.client.train([SAMPLE])
        # The lost run's lease ends by itself.
        assert last.finished.failure.reason in ("", "LEASE_HELD")
        return last.finished.state == pb.RUN_STATE_SUCCEEDED

    qwen3.wait_for(trains, "a run")


def test_the_apollo_state_survives_a_stop_and_the_step_count_goes_on(qwen3):
    steps = steps_of(list(qwen3.client.train([SAMPLE], epochs=3)))
    assert qwen3.end("server") == 0
    assert (qwen3.vllm.poll(), bool(qwen3.complete([70, 71]))) == (None, True)
    qwen3.start_server()
    assert qwen3.wait_attached().optimizer_step == steps[-1].optimizer_step
    (step,) = steps_of(list(qwen3.client.train([SAMPLE])))
    assert step.optimizer_step == steps[-1].optimizer_step + 1
    assert step.loss < steps[0].loss, "the weights are vLLM's and were still there"


def test_a_stop_in_mid_run_keeps_every_step_that_was_told(qwen3):
    stream = qwen3.client.train([SAMPLE], epochs=5000, min_loss=0)
    events = read_steps(stream, 3)
    os.kill(qwen3.server.pid, signal.SIGTERM)
    events += stream
    assert events[-1].finished.failure.reason == "SERVER_STOPPED"
    assert qwen3.server.wait(HANG) == 0
    qwen3.start_server()
    assert qwen3.wait_attached().optimizer_step == steps_of(events)[-1].optimizer_step


def test_a_killed_server_cannot_freeze_the_engine(qwen3):
    stream = qwen3.client.train([SAMPLE], epochs=5000, min_loss=0, coherence="pause_run")
    read_steps(stream, 1)
    qwen3.end("server", signal.SIGKILL)
    # The lease of 10 seconds, and the answer itself.
    with at_most(20):
        assert qwen3.complete([70, 71, 72])["choices"]
    qwen3.start_server()
    *_, interrupted = stream
    assert interrupted.finished.failure.reason == "INTERRUPTED"
    assert interrupted.finished.steps_done >= 1
    reached = qwen3.wait_attached().optimizer_step
    assert qwen3.client.get_run(interrupted.run_id).steps_done <= reached
    *_, last = qwen3.client.train([SAMPLE])
    assert last.finished.state == pb.RUN_STATE_SUCCEEDED


def test_questions_wait_while_a_run_is_at_work_and_are_answered_after_it(qwen3):
    stream = qwen3.client.train([SAMPLE], epochs=20, min_loss=0, coherence="pause_run")
    events = read_steps(stream, 1)
    answered = qwen3.complete([70, 71, 72], max_tokens=4)
    assert qwen3.client.status().active_run_id == "" or answered
    events += stream
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert answered["usage"]["completion_tokens"] > 0

"""Many kills at random instants: `make soak`; `SOAK_KILLS` says how many, seeded."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time

import pytest

from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG

pytestmark = [pytest.mark.vllm, pytest.mark.soak, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("SOAK_KILLS", "50"))
SEED = 20412
SAMPLE = {"context_ids": list(range(70, 100)), "continuation_ids": list(range(100, 130))}
DETACHED = status_pb2.ATTACHMENT_STATE_DETACHED
LEASE_SECONDS = 10.0
NOTICE_SECONDS = 2.0


class Run:
    """A long run whose events a thread reads, with the time at which the last one came."""

    def __init__(self, stack):
        self.events: list[pb.RunEvent] = []
        self._stream = stack.client.train(
            [SAMPLE], epochs=100_000, accept_other_weights=True, min_loss=0
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._stream:
                self.events.append(event)
        except Unavailable:
            pass
        self.ended_at = time.monotonic()

    def wait_for_a_step(self) -> None:
        deadline = time.monotonic() + 60
        while not any(event.HasField("step") for event in self.events):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(HANG)
        assert not self._thread.is_alive()

    def steps_since(self, wall: float) -> list[float]:
        """How long after a time of the clock each later step was told."""
        stamps = [e.event_time.ToNanoseconds() / 1e9 for e in self.events if e.HasField("step")]
        return [stamp - wall for stamp in stamps if stamp > wall]


def end_what_is_left(stack) -> None:
    stack.end("vllm", signal.SIGKILL)


def test_vllm_is_killed_again_and_again_and_trained_again_each_time(qwen3):
    draw, noticed, ended, late = random.Random(SEED), [], [], [0.0]
    server = qwen3.server.pid
    for _ in range(KILLS):
        run = Run(qwen3)
        run.wait_for_a_step()
        time.sleep(draw.uniform(0, 1.5))
        processes = qwen3.vllm_processes()
        victims = draw.choice([["api server", "engine core"], ["engine core"], ["api server"]])
        wall, began = time.time(), time.monotonic()
        for victim in victims:
            os.kill(processes[victim], signal.SIGKILL)
        qwen3.wait_for(lambda: qwen3.client.status().attachment == DETACHED, "the detachment")
        noticed.append(time.monotonic() - began)
        run.join()
        ended.append(run.ended_at - began)
        late += run.steps_since(wall)
        assert run.events[-1].finished.failure.reason == "ENGINE_LOST"
        sequences = [event.sequence for event in run.events]
        assert sequences == list(range(1, len(sequences) + 1))
        assert (qwen3.server.pid, qwen3.server.poll()) == (server, None)
        end_what_is_left(qwen3)
        qwen3.start_vllm()
        qwen3.wait_attached()
        *_, last = qwen3.client.train([SAMPLE], accept_other_weights=True)
        assert last.finished.state == pb.RUN_STATE_SUCCEEDED
        print(
            f"killed {' and '.join(victims)}: detached after {noticed[-1]:.2f} s, "
            f"run ended after {ended[-1]:.2f} s, last step {max(late):.3f} s after a kill",
            flush=True,
        )
    print(
        f"{KILLS} kills of vLLM: detached after at most {max(noticed):.2f} s, run ended after at "
        f"most {max(ended):.2f} s, last step told {max(late):.3f} s after a kill"
    )
    assert max(noticed) < NOTICE_SECONDS
    assert max(ended) < NOTICE_SECONDS


def test_the_training_server_is_killed_again_and_again_and_vllm_goes_on(qwen3):
    draw, waits = random.Random(SEED + 1), []
    for number in range(KILLS):
        run = Run(qwen3)
        # From before the pause to well into it; now and then while it attaches.
        time.sleep(draw.uniform(0, 0.6))
        qwen3.end("server", signal.SIGKILL)
        began = time.monotonic()
        answer = qwen3.complete([70, 71, 72], max_tokens=4, logprobs=1)
        waits.append(time.monotonic() - began)
        scores = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert all(math.isfinite(score) for score in scores)
        qwen3.start_server()
        if number % 5 == 4:
            time.sleep(draw.uniform(0, 0.5))
            qwen3.end("server", signal.SIGKILL)
            assert qwen3.complete([70, 71, 72])["choices"]
            qwen3.start_server()
        status = qwen3.wait_attached()
        assert status.logprob_difference < 1e-3
        # It reads on where it was: the server that is back has settled the run, or, if it was
        # killed before it had taken the run, takes it now.
        while run.is_alive():
            for unfinished in qwen3.client.list_runs(states=["queued", "running"]).runs:
                qwen3.client.cancel_run(unfinished.run_id)
            time.sleep(0.1)
        assert run.events[-1].finished.failure.reason in ("INTERRUPTED", "")
        print(f"killed: vLLM decoded again after {waits[-1]:.2f} s", flush=True)
    print(f"{KILLS} kills of the training server: decoded again after at most {max(waits):.2f} s")
    assert max(waits) < LEASE_SECONDS + 1.0

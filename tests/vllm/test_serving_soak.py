"""Requests beside a thousand steps: `make soak`; `SOAK_REQUESTS` says how many requests a mode."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from apollo_grpc.v1 import training_pb2 as pb

pytestmark = [pytest.mark.vllm, pytest.mark.soak, pytest.mark.timeout(7200)]
REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10000"))
STEPS = REQUESTS // 10
STREAMS, TOKENS = 4, 4
STALL_SECONDS = 1.0
SAMPLE = {"context_ids": list(range(70, 100)), "continuation_ids": list(range(100, 110))}


class Requests:
    """Takes numbers until all are asked, and keeps the longest answer and how many failed."""

    def __init__(self, stack: Any):
        self._stack, self._lock = stack, threading.Lock()
        self.asked = 0
        self.longest, self.failed = 0.0, list[str]()

    def ask(self, trained: threading.Event) -> None:
        while self.asked < REQUESTS or not trained.is_set():
            with self._lock:
                self.asked += 1
                prompt = [60 + self.asked % 50, 61, 62 + self.asked % 40]
            began = time.monotonic()
            try:
                answer = self._stack.complete(prompt, max_tokens=TOKENS, ignore_eos=True)
                assert answer["usage"]["completion_tokens"] == TOKENS
            except Exception as error:
                self.failed.append(repr(error))
            with self._lock:
                self.longest = max(self.longest, time.monotonic() - began)


@pytest.mark.parametrize("mode", ["pause_step", "live", "pause_run"])
def test_no_request_fails_or_stalls_beside_a_thousand_steps(qwen3: Any, mode: str) -> None:
    """In `pause_run` requests wait for the run, by its name: none of them fails."""
    requests, trained = Requests(qwen3), threading.Event()
    with ThreadPoolExecutor(STREAMS) as pool:
        asking = [pool.submit(requests.ask, trained) for _ in range(STREAMS)]
        events = list(
            qwen3.client.train([SAMPLE], epochs=STEPS, lr=1e-7, min_loss=0, coherence=mode)
        )
        trained.set()
        for each in asking:
            each.result()
    print(f"{mode}: {requests.asked} requests, the longest {requests.longest:.3f} s")
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert events[-1].finished.steps_done == STEPS
    assert requests.failed == []
    if mode != "pause_run":
        assert requests.longest < STALL_SECONDS

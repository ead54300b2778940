"""Each coherence and cache policy, against a vLLM that decodes all the while."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG

pytestmark = pytest.mark.vllm
# vLLM keeps prefixes in whole blocks, of 128 tokens on a CPU.
PROMPT = list(range(60, 240))
SAMPLE = {"context_ids": PROMPT, "continuation_ids": list(range(100, 110))}
# Weight versions of a run, and how far rounding moves a log-probability of one of them.
VERSIONS, NOISE = 24, 2e-5
MODES = ("live", "pause_step", "pause_run")
POLICIES = ("reset_at_end", pytest.param("reset_each_step", marks=pytest.mark.long), "keep")


class Decoding:
    """Requests one after the other in threads of their own, and what came of them."""

    def __init__(self, stack: Any, streams: int = 3):
        self._stack, self._stop = stack, threading.Event()
        self.answers: list[tuple[float, float, str]] = []
        self.failed: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(streams)]

    def _ask(self, stream: int) -> None:
        prompt = [*PROMPT[:40], 30 + stream]
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                answer = self._stack.complete(prompt, max_tokens=48, ignore_eos=True)
            except BaseException as error:
                self.failed.append(error)
                return
            reason = answer["choices"][0]["finish_reason"]
            assert answer["usage"]["completion_tokens"] == 48
            self.answers.append((asked, time.monotonic(), reason))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(HANG)
            assert not thread.is_alive(), "a request hangs"


@contextmanager
def decoding(stack: Any) -> Iterator[Decoding]:
    requests = Decoding(stack)
    requests.start()
    try:
        while len(requests.answers) < 3 and not requests.failed:
            time.sleep(0.01)
        yield requests
    finally:
        requests.stop()


def cached_tokens(stack: Any) -> int:
    """Of the prompt, those that vLLM took from its prefix cache."""
    usage = stack.complete(PROMPT)["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_requests_go_on_through_a_run_and_no_stale_prefix_is_used_after_a_reset(
    qwen3: Any, mode: str, policy: str
) -> None:
    cached_tokens(qwen3)
    assert cached_tokens(qwen3) > 0, "the prefix is cached before the run"
    version = qwen3.client.status().weight_version
    with decoding(qwen3) as requests:
        began = time.monotonic()
        events = list(qwen3.client.train([SAMPLE], epochs=8, coherence=mode, cache_policy=policy))
        ended = time.monotonic()
        after = cached_tokens(qwen3)
    finished = events[-1].finished
    assert finished.state == pb.RUN_STATE_SUCCEEDED, finished.failure
    assert finished.weight_version == version + 8
    assert requests.failed == []
    assert {reason for _, _, reason in requests.answers} == {"length"}
    spanning = [a for a in requests.answers if a[0] < ended and a[1] > began]
    assert spanning, "no request was in flight during the run"
    assert (after > 0) == (policy == "keep"), f"{after} tokens of a prefix of before the run"
    warnings = [event.warning for event in events if event.HasField("warning")]
    assert warnings == []


@pytest.mark.parametrize("mode", MODES)
def test_a_pause_is_as_long_as_the_mode_says(qwen3: Any, mode: str) -> None:
    began = time.monotonic()
    events = list(qwen3.client.train([SAMPLE], epochs=5, coherence=mode))
    elapsed = time.monotonic() - began
    steps = [event.step for event in events if event.HasField("step")]
    held = [step.pause_time.ToNanoseconds() / 1e9 for step in steps]
    whole = events[-1].finished.pause_time.ToNanoseconds() / 1e9
    if mode == "live":
        assert whole == sum(held) == 0
    elif mode == "pause_step":
        assert min(held) > 0
        assert whole == pytest.approx(sum(held), abs=1e-6)
        forward = sum(step.forward_time.ToNanoseconds() for step in steps) / 1e9
        assert whole <= elapsed - forward
    else:
        assert sum(held) == 0 < whole <= elapsed


@pytest.mark.parametrize("mode", MODES)
def test_vllm_answers_with_what_was_learned_in_every_mode(qwen3: Any, mode: str) -> None:
    learned = {"context_ids": PROMPT[:30], "continuation_ids": [44 + MODES.index(mode)] * 4}
    before = qwen3.engine_logprobs(learned["context_ids"] + learned["continuation_ids"])[-4:]
    events = list(qwen3.client.train([learned], epochs=12, lr=3e-3, coherence=mode, evaluate=True))
    first, last = (event.evaluated.losses[0] for event in events if event.HasField("evaluated"))
    after = qwen3.engine_logprobs(learned["context_ids"] + learned["continuation_ids"])[-4:]
    assert last < first
    assert -float(before.mean()) == pytest.approx(first, abs=0.02)
    assert -float(after.mean()) == pytest.approx(last, abs=0.02)


def test_each_answer_beside_a_run_is_of_one_weight_version(qwen3: Any) -> None:
    """The versions are seen one by one first; the same steps follow from the same state."""
    taught = {"context_ids": PROMPT[:30], "continuation_ids": [51, 52, 53]}
    how = {"lr": 2e-4, "min_loss": 0, "coherence": "pause_step"}
    start = qwen3.client.create_snapshot("before")
    versions = [first_logprob(qwen3)]
    for _ in range(VERSIONS):
        list(qwen3.client.train([taught], epochs=1, **how))
        versions.append(first_logprob(qwen3))
    assert min(abs(a - b) for a, b in pairwise(versions)) > 20 * NOISE
    qwen3.client.restore(start.snapshot_id)
    assert first_logprob(qwen3) == pytest.approx(versions[0], abs=NOISE)
    answers, done = list[float](), threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(first_logprob(qwen3))

    asking = threading.Thread(target=ask)
    asking.start()
    events = list(qwen3.client.train([taught], epochs=VERSIONS, **how))
    done.set()
    asking.join()
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    nearest = [min(range(len(versions)), key=lambda v: abs(versions[v] - a)) for a in answers]
    assert max(abs(versions[v] - a) for v, a in zip(nearest, answers, strict=True)) < NOISE
    assert nearest == sorted(nearest)
    assert len(set(nearest)) > 3, "answers came beside several versions"
    qwen3.client.delete_snapshot(start.snapshot_id)


def first_logprob(stack: Any) -> float:
    """Of one token after a prompt that is shorter than a block, and so computed anew."""
    return float(stack.engine_logprobs([*PROMPT[:30], 51])[-1])


def test_a_dry_run_leaves_vllm_as_it_was(qwen3: Any) -> None:
    ids = PROMPT + SAMPLE["continuation_ids"]
    before, status = qwen3.engine_logprobs(ids), qwen3.client.status()
    events = list(qwen3.client.train([SAMPLE], epochs=3, lr=1e-2, dry_run=True))
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert qwen3.engine_logprobs(ids).equal(before)
    now = qwen3.client.status()
    assert (now.weight_version, now.optimizer_step) == (
        status.weight_version,
        status.optimizer_step,
    )

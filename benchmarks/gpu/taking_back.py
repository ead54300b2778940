"""Snapshot, undo, restore and sync of a vLLM that decodes on a GPU: seconds, and what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from apollo_trainer.weights.sidecar import Sidecar
from benchmarks.gpu.stack import Stack

STEPS, UNDONE = 6, 2
LEARNING_RATE = 2e-4
T = TypeVar("T")
Sample = dict[str, list[int]]


def take_back(stack: Stack, sample: Sample) -> dict[str, Any]:
    """Trains, takes it back by undo and by restore, trains again; then sync, and verify.

    Differences are of vLLM's log-probabilities of the sample, in nats; 0.0 is to the last bit
    where vLLM's kernels are deterministic, which `engine_repeats` tells.
    """
    found: dict[str, Any] = {}

    def timed(name: str, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = call()
        found[f"{name}_seconds"] = round(time.perf_counter() - began, 3)
        return result

    with decoding(stack, sample["context_ids"]) as answers:
        before = scores(stack, sample)
        found["engine_repeats"] = difference(before, scores(stack, sample))
        first = timed("first_snapshot", lambda: stack.client.create_snapshot("before"))
        losses = train(stack, sample)
        after = scores(stack, sample)
        found["steps_moved"] = difference(before, after)
        second = timed("snapshot", lambda: stack.client.create_snapshot("after"))
        found["snapshot_bytes"] = [first.size_bytes, second.size_bytes]
        train(stack, sample, UNDONE)
        timed("undo", lambda: stack.client.undo(UNDONE))
        found["undo_differs"] = difference(after, scores(stack, sample))
        restored = timed("restore", lambda: stack.client.restore("before"))
        found["restored_bytes"] = restored.bytes_written
        found["restore_differs"] = difference(before, scores(stack, sample))
        again = train(stack, sample)
        found["losses_differ"] = max(abs(a - b) for a, b in zip(losses, again, strict=True))
        timed("second_restore", lambda: stack.client.restore("after"))
        found["second_restore_differs"] = difference(after, scores(stack, sample))
        timed("sync", stack.client.sync)
        verified = timed("verify", lambda: stack.client.verify(full=True, live=True))
        found["verify_differences"] = len(verified.differences)
    found["answers_meanwhile"] = len(answers)
    return found


def train(stack: Stack, sample: Sample, steps: int = STEPS) -> list[float]:
    """The losses of a run of that many steps. Raises SystemExit where it failed."""
    events = list(stack.client.train([sample], epochs=steps, lr=LEARNING_RATE))
    losses = [event.step.loss for event in events if event.HasField("step")]
    if len(losses) != steps:
        raise SystemExit(f"the run failed: {events[-1].finished.failure.message}")
    return losses


def scores(stack: Stack, sample: Sample) -> torch.Tensor:
    """vLLM's log-probability of each token after the first, fp64 [tokens - 1]."""
    sidecar = Sidecar(stack.sidecar)
    try:
        prompt = sample["context_ids"] + sample["continuation_ids"]
        return torch.tensor(sidecar.score(sidecar.manifest().epoch, prompt), dtype=torch.float64)
    finally:
        sidecar.close()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest of any token."""
    return float((one - other).abs().max())


@contextmanager
def decoding(stack: Stack, prompt: list[int]) -> Iterator[list[list[int]]]:
    """Has vLLM decode answer after answer meanwhile; yields those that have come."""
    answers: list[list[int]] = []
    ended = threading.Event()

    def decode() -> None:
        while not ended.is_set():
            answers.append(stack.greedy(prompt, 32))

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join()

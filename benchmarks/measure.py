"""Times and memory of optimizer steps, on a GPU or a CPU."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from shapes import Shapes
from torch import Tensor, nn
from torch.optim import Optimizer

from apollo_trainer.optim.factored import Factored, Gradient

Weights = dict[str, nn.Parameter]
WEIGHT_STD, GRADIENT_STD = 0.02, 1e-3


@dataclass(frozen=True)
class Effort:
    """How long a row is measured: `steps`, or fewer where they would take over `seconds`."""

    steps: int
    warmup: int
    seconds: float

    def within(self, step_ms: float) -> int:
        """The steps to time when one takes about `step_ms`; at least 3."""
        return max(
            min(3, self.steps), min(self.steps, int(self.seconds * 1e3 / max(step_ms, 1e-3)))
        )


def make_weights(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Weights:
    """Parameters of these shapes with random values."""
    torch.manual_seed(0)
    return {
        name: nn.Parameter(torch.empty(s, dtype=dtype, device=device).normal_(0.0, WEIGHT_STD))
        for name, s in shapes.items()
    }


def give_gradients(weights: Weights) -> None:
    """Gives every parameter a random gradient of its own dtype, unless it has one."""
    for p in weights.values():
        if p.grad is None:
            p.grad = torch.empty_like(p).normal_(0.0, GRADIENT_STD)


def make_factors(weights: Weights, tokens: int) -> dict[Tensor, Gradient]:
    """Gradients as large as those of `give_gradients`, those of matrices as factors of tokens."""
    std = (GRADIENT_STD / math.sqrt(tokens)) ** 0.5

    def random(std: float, like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape).normal_(0.0, std)

    return {
        p: Factored(*(random(std, p, tokens, side) for side in p.shape))
        if p.ndim == 2
        else random(GRADIENT_STD, p, *p.shape)
        for p in weights.values()
    }


def gradient_bytes(weights: Weights, tokens: int) -> int:
    """Of all gradients; those of matrices as factors of so many tokens, 0: as they are."""
    return sum(
        p.itemsize * tokens * sum(p.shape) if tokens and p.ndim == 2 else p.nbytes
        for p in weights.values()
    )


def drop_gradients(weights: Weights) -> None:
    """Releases the gradients and what else nothing refers to."""
    for p in weights.values():
        p.grad = None
    free()


def free() -> None:
    """Returns unused memory, so that one row does not live on another's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_bandwidth(device: torch.device, gigabytes: float) -> float:
    """Bytes read and written a second by a copy of one tensor into another, the median of 20."""
    source = torch.zeros(int(gigabytes * 1e9), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_calls(lambda: target.copy_(source), 23, device)[3:]
    return 2 * source.nbytes / (statistics.median(times) / 1e3)


def time_calls(call: Callable[[], Any], calls: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `calls` calls, one queued behind the other.

    On a GPU they are between events on the stream: the host's work counts where the device waits
    for it. This is what an optimizer costs behind a backward pass.
    """
    if device.type != "cuda":
        return [_wall_ms(call) for _ in range(calls)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def time_alone(call: Callable[[], Any], calls: int, device: torch.device) -> list[float]:
    """Milliseconds of each call from an idle device until it is idle again, host included."""
    return [_wall_ms(call, device) for _ in range(calls)]


def _wall_ms(call: Callable[[], Any], device: torch.device | None = None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def measure_steps(
    call: Callable[[], Any],
    refresh: Callable[[], None] | None,
    effort: Effort,
    device: torch.device,
) -> dict[str, Any]:
    """Times of a step, after warm-up; `refresh` makes every later step draw a new projection."""
    guess = min(time_alone(call, effort.warmup, device))
    steps = effort.within(guess)
    before = _start_peak(device)
    row: dict[str, Any] = {"steps": steps, **_spread(time_calls(call, steps, device))}
    if device.type == "cuda":
        row["ms_alone"] = statistics.median(time_alone(call, steps, device))
    if refresh is not None:
        refresh()
        few = max(1, steps // 4)
        row["ms_refresh"] = statistics.median(time_calls(call, few, device))
    row["peak_extra_bytes"] = _peak(device, before)
    return row


def _spread(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}


def measure_factors(
    optimizer: Any,
    weights: Weights,
    tokens: int,
    refresh: Callable[[], None] | None,
    effort: Effort,
    device: torch.device,
) -> dict[str, Any]:
    """A step from factors, as training takes it: their norm, which a guard judges, and the write.

    `ms_prepare` is the norm and what is set aside for the write, within `ms`.
    """
    drop_gradients(weights)
    gradients = make_factors(weights, tokens)

    def one_step() -> None:
        optimizer.prepare(gradients)
        optimizer.step(gradients=gradients)

    row = measure_steps(one_step, refresh, effort, device)
    times = time_calls(lambda: optimizer.prepare(gradients), row["steps"], device)
    row["ms_prepare"] = statistics.median(times)
    optimizer.forget()
    return row


def _start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def state_bytes(optimizer: Optimizer) -> int:
    """Exact bytes of the tensors that an optimizer keeps, those inside projectors included."""
    return sum(t.nbytes for entry in optimizer.state.values() for t in _tensors(entry.values()))


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "ortho_matrix"):
            yield from _tensors(vars(value).values())

"""Whichever allocation of a step fails: before the write nothing changed, in it the step says so.

On a CPU and on a GPU allocations that torch dispatches are made to fail: each, where a test is
long, else some. A GPU is also filled, so that its own allocator refuses.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.cuda import FusedStepper, Work
from apollo_trainer.training.batch import MicroBatch
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.gradients import Collected, StepGradients
from apollo_trainer.training.guard import Guard
from apollo_trainer.training.incomplete import StepIncomplete
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.objectives import Clip
from apollo_trainer.training.out_of_memory import OutOfMemory
from apollo_trainer.training.step import StepPolicy
from tests.training.test_refusals import (
    AT_ONCE,
    NEEDS_CUDA,
    Case,
    Make,
    Pair,
    Trained,
    step_alike,
    twins,
)

PREVIEWING = StepPolicy(guard=Guard(max_update_ratio=9.0))
# Functions of the product, and the phase of a step that an allocation inside is of.
PHASES = {
    "loss.batch_loss": "forward",
    "gradients.add": "collecting",
    "gradients.add_rows": "collecting",
    "step._run": "backward",
    "figures.on_device": "summing",
    "gradients.settle": "settling",
    "gradients.summed_gradients": "settling",
    "scratch.set_aside": "setting aside",
    "preview._add": "previewing",
    "apollo.prepare": "preparing",
    "step._judge": "judging",
}


class NoMemory(TorchDispatchMode):
    """Makes allocations of one optimizer's next step fail, before its write or in it.

    Args:
        first: the number of the first that fails; None counts them.
        last: of the last; None is all that follow.
        in_write: they are those after the write was allowed, instead of those before.
    """

    def __init__(
        self, optimizer: Apollo, first: int | None, last: int | None = None, in_write: bool = False
    ):
        super().__init__()
        self.asked, self.phases = 0, set[str]()
        self._first, self._last = first or sys.maxsize, last or sys.maxsize
        self._in_write, self._writing = in_write, False
        optimizer.before_write = self._begin_write

    def _begin_write(self) -> None:
        self._writing = True

    def ask(self, error: type[Exception] = torch.OutOfMemoryError) -> None:
        """Counts an allocation, or raises."""
        if self._writing == self._in_write:
            self.asked += 1
            if self._first <= self.asked <= self._last:
                self.phases.add(_phase())
                raise error("Tried to allocate 2.00 GiB.")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _allocates(func):
            self.ask()
        return func(*args, **(kwargs or {}))


@cache
def _allocates(func: Any) -> bool:
    """Whether an operation returns a tensor that is not its argument's memory."""
    returns = func._schema.returns
    return any("Tensor" in str(r.type) and r.alias_info is None for r in returns)


def _phase() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        if name in PHASES:
            return PHASES[name]
        frame = frame.f_back
    # A device's backward passes run in a thread of torch's.
    return "" if threading.current_thread() is threading.main_thread() else "backward"


class Recorded:
    """Passes that ran once, taken again: what comes after them is tried without them."""

    def __init__(self, model: Any):
        self._model = model
        self._left: tuple[Tensor, Collected] | None = None

    def take(
        self,
        batch: MicroBatch,
        divisor: float,
        gradients: StepGradients,
        *,
        alone: bool,
        clip: Clip,
    ) -> Tensor:
        if self._left is None:
            mine = StepGradients(self._model.parameters())
            with mine.collecting():
                contexts = FrozenContexts(self._model)
                weighted, sums = batch_loss(self._model, batch, contexts, divisor, clip)
                torch.autograd.backward([weighted])
            self._left = sums, mine.held
        sums, collected = self._left
        gradients.replay(collected, copy=True)
        return sums

    def let_go(self) -> bool:
        return False


def shallow(make_model: Make, case: Case) -> Pair:
    """Twins of one layer: a second one allocates what the first does."""
    config = make_model(case.family).config
    config.num_hidden_layers = 1

    def make() -> Any:
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).float().eval()

    return twins(make, case)


def allow_writes(pair: Pair) -> None:
    for trained in pair:
        trained.optimizer.before_write = lambda: None


def marked(*cases: Case) -> list[Any]:
    marks = {"cpu": (), "cuda": (NEEDS_CUDA,)}
    return [pytest.param(case, id=str(case), marks=marks[case.device]) for case in cases]


ON_CPU = (
    Case("qwen3", torch.bfloat16, "fused"),
    Case("qwen3_moe", torch.float32, "reference"),
)
ON_CUDA = (
    Case("qwen3", torch.bfloat16, "fused", "cuda"),
    Case("qwen3_moe", torch.float32, "fused", "cuda"),
)


def every(quick: int, full: int = 1) -> pytest.MarkDecorator:
    """How far apart the allocations are that fail."""
    long = pytest.param(full, marks=pytest.mark.long)
    return pytest.mark.parametrize("stride", [quick, long])


def refuse_each(trained: Trained, policy: StepPolicy, stride: int) -> set[str]:
    """Makes every `stride`-th allocation before the write fail; then a step succeeds."""
    before, phases = trained.everything(), set[str]()
    # What a device is given once is asked for here, and not in some of them alone.
    trained.step(StepPolicy(dry_run=True))
    for first in itertools.count(1, stride):
        memory = NoMemory(trained.optimizer, first)
        try:
            with memory:
                trained.step(policy)
            assert memory.asked < first and not memory.phases
            return phases
        except OutOfMemory as error:
            assert "nothing of it was written" in error.message
        phases |= memory.phases
        assert not any(p.grad is not None for p in trained.model.parameters())
        assert trained.everything() == before, f"allocation {first}, {memory.phases}"
    raise AssertionError


@every(5)
@pytest.mark.parametrize("case", marked(*ON_CPU, *ON_CUDA))
def test_whichever_allocation_fails_before_the_write(
    make_model: Make, case: Case, stride: int
) -> None:
    pair = shallow(make_model, case)
    phases = refuse_each(pair[0], AT_ONCE, stride)
    assert phases >= {"forward", "backward", "preparing"}
    if stride == 1:
        assert phases >= {"collecting", "summing"}
        # The last of all; on a GPU there are fewer where a table needs no upload again.
        assert "judging" in phases or case.device == "cuda"
        # Two tied tensors have two gradients.
        assert "settling" in phases or case.family != "qwen3"
    pair[1].step()
    assert pair[0].digest() == pair[1].digest()


@every(29, 5)
@pytest.mark.parametrize("case", marked(*ON_CPU, *ON_CUDA))
def test_whichever_allocation_of_a_preview_fails(make_model: Make, case: Case, stride: int) -> None:
    pair = shallow(make_model, case)
    pair[0].passes = Recorded(pair[0].model)  # type: ignore[assignment]
    # Parameters are previewed one after another, by the same code.
    assert "previewing" in refuse_each(pair[0], PREVIEWING, stride)
    pair[1].step(PREVIEWING)
    assert pair[0].digest() == pair[1].digest()


@every(19)
@pytest.mark.parametrize("case", marked(*ON_CPU))
def test_whichever_allocation_fails_in_the_write(
    make_model: Make,
    case: Case,
    stride: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A CPU's loops and plain torch allocate while they write: such a step tells it is incomplete.

    Python's own memory is not counted.
    """
    caplog.set_level(logging.CRITICAL)
    pair = shallow(make_model, case)
    trained, memory = pair[0], NoMemory(pair[0].optimizer, None)
    trained.passes = Recorded(trained.model)  # type: ignore[assignment]
    for name in ("empty", "full", "ones"):
        made = getattr(np, name)

        def make(*args: Any, made: Callable[..., Any] = made, **kwargs: Any) -> Any:
            memory.ask(MemoryError)
            return made(*args, **kwargs)

        monkeypatch.setattr(np, name, make)
    memory = NoMemory(trained.optimizer, None, in_write=True)
    with memory:
        trained.step()
    trained.put_back()
    total = memory.asked
    assert total > 100
    # The last one is of what the step tells of itself.
    for first in (*range(1, total, stride), total):
        memory = NoMemory(trained.optimizer, first, in_write=True)
        with memory, pytest.raises(StepIncomplete, match="part of it is in the weights"):
            trained.step()
        assert trained.optimizer.wrote and trained.optimizer.step_count == 6
        trained.put_back()
    monkeypatch.undo()
    allow_writes(pair)
    step_alike(pair)


def test_a_stepper_without_memory_keeps_no_table_of_another_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither where gradients lie nor the learning rate: the next step would go by it."""
    torch.manual_seed(0)
    given = [("w", torch.randn(32, 16)), ("v", torch.randn(16))]
    optimizer, upload = Apollo(given, rank=4, warmup_steps=9), FusedStepper._upload
    grads = [[torch.randn_like(t) for _, t in given] for _ in range(2)]
    left = sys.maxsize

    def upload_some(stepper: FusedStepper, host: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
        return upload(stepper, host)

    def tables(stepper: FusedStepper, number: int) -> list[Tensor | None]:
        optimizer.step_count = number - 1
        slots, settings = optimizer._slots, optimizer._settings()
        pairs = zip(slots, grads[number - 1], strict=True)
        works = [Work(slot, grad, optimizer.state[slot.param]) for slot, grad in pairs]
        waves = stepper.prepare(works, settings, "stochastic", True).waves
        stepper.begin(number, settings)
        return [stepper._settings_on_device, *(wave.desc for wave in waves)]

    monkeypatch.setattr(FusedStepper, "_upload", upload_some)
    expected = tables(FusedStepper(torch.device("cpu"), False), 2)
    for uploads, steps in itertools.product(range(3), (0, 1)):
        stepper, left = FusedStepper(torch.device("cpu"), False), sys.maxsize
        for number in range(1, 1 + steps):
            tables(stepper, number)
        left = uploads
        with pytest.raises(torch.OutOfMemoryError):
            tables(stepper, 2)
        left = sys.maxsize
        for found, wanted in zip(tables(stepper, 2), expected, strict=True):
            assert found is not None and wanted is not None and torch.equal(found, wanted)

"""Refusals of a GPU's own: its memory is full, or a graph of a step's passes finds none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import apollo_trainer.optim.cuda.stepper as stepper_module
import apollo_trainer.training.step as step_module
from apollo_trainer.optim import Apollo
from apollo_trainer.optim.cuda import FusedStepper
from apollo_trainer.optim.preview import Preview
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.gradients import StepGradients
from apollo_trainer.training.out_of_memory import OutOfMemory
from apollo_trainer.training.step import StepPolicy
from tests.training.test_refusals import AT_ONCE, NEEDS_CUDA, Case, Make, step_alike, twins
from tests.training.test_refusals_memory import (
    ON_CUDA,
    PREVIEWING,
    NoMemory,
    allow_writes,
    shallow,
)

pytestmark = NEEDS_CUDA
DRY_RUN = StepPolicy(dry_run=True)
CAPTURED = (
    Case("qwen3", torch.bfloat16, "fused", "cuda", True),
    Case("qwen3", torch.float32, "fused", "cuda", True),
)


@pytest.mark.parametrize("case", (*ON_CUDA, *CAPTURED), ids=str)
def test_nothing_is_allocated_while_a_gpu_writes(
    make_model: Make, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = shallow(make_model, case)[0]
    optimizer, end, counts = trained.optimizer, trained.optimizer._end, list[int]()

    def count(*_: Any) -> None:
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])

    def count_and_end(change: Any) -> None:
        count()
        end(change)

    optimizer.before_param_write = count
    monkeypatch.setattr(optimizer, "_end", count_and_end)
    for _ in range(2):
        counts.clear()
        trained.step()
        assert len(counts) > 2 and counts[-1] == counts[0], counts


@contextmanager
def card_with(free: int) -> Iterator[None]:
    """The allocator has so many bytes to give, in whole segments, and nothing of what it holds."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    ballast, held = list[Tensor](), torch.cuda.memory_reserved()
    try:
        _limit(held)
        for power in range(30, 8, -1):
            with suppress(torch.OutOfMemoryError):
                while True:
                    ballast.append(torch.empty(2**power, dtype=torch.uint8, device="cuda"))
        _limit(held + free)
        yield
    finally:
        ballast.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


def _limit(most: int) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(most / total)


# What is entered when the card is full, and of which kind of step.
ENTERED: dict[str, tuple[Any, str, StepPolicy]] = {
    "forward": (step_module, "batch_loss", AT_ONCE),
    "backward": (torch.autograd, "backward", AT_ONCE),
    "collecting": (StepGradients, "add_rows", AT_ONCE),
    "settling": (step_module, "summed_gradients", AT_ONCE),
    "preparing": (Apollo, "prepare", AT_ONCE),
    "setting aside": (stepper_module, "set_aside", AT_ONCE),
    "squares": (FusedStepper, "squares", AT_ONCE),
    "previewing": (Preview, "_add", PREVIEWING),
    "beginning": (FusedStepper, "begin", AT_ONCE),
}


@pytest.mark.parametrize("phase", ENTERED)
@pytest.mark.parametrize("case", ON_CUDA, ids=str)
def test_a_card_that_is_full(
    make_model: Make, case: Case, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, (owner, name, policy) = shallow(make_model, case), ENTERED[phase]
    # Of one sample each: none is left that could be tried by halves.
    policy = replace(policy, token_budget=1)
    trained, before, entered = pair[0], pair[0].everything(), getattr(owner, name)
    with ExitStack() as stack:

        def enter(*args: Any, **kwargs: Any) -> Any:
            monkeypatch.setattr(owner, name, entered)
            stack.enter_context(card_with(0))
            return entered(*args, **kwargs)

        monkeypatch.setattr(owner, name, enter)
        with pytest.raises(OutOfMemory, match="nothing of it was written"):
            trained.step(policy)
        assert getattr(owner, name) is entered
    assert trained.everything() == before
    step_alike(pair, policy)


@pytest.mark.parametrize("case", (*ON_CUDA, *CAPTURED), ids=str)
def test_a_card_with_ever_more_memory(make_model: Make, case: Case) -> None:
    """Until a step has enough, and its graph too: without one it runs as it is."""
    pair = twins(lambda: make_model(case.family), case)
    trained, before, refused, told = pair[0], pair[0].digest(), 0, list[float]()
    expected = trained.step(DRY_RUN).loss_sum
    for mebibytes in (0, *(2**power for power in range(1, 13))):
        if case.captured:
            trained.passes = CapturedPasses(trained.model)
        with card_with(mebibytes * 2**20):
            try:
                told = [trained.step(DRY_RUN).loss_sum for _ in range(3)]
                assert told == pytest.approx([expected] * 3, rel=0.02), f"{mebibytes} MiB"
            except OutOfMemory:
                refused += 1
        assert trained.digest() == before, f"{mebibytes} MiB"
    assert refused and told
    if trained.passes is not None:
        assert len(trained.passes), trained.passes.refusal
    for each in pair:
        each.passes = None
    step_alike(pair)


@pytest.mark.parametrize("case", CAPTURED, ids=str)
def test_a_replay_that_finds_no_memory(make_model: Make, case: Case) -> None:
    """Its graphs are let go of, and the step that runs as it is finds none either."""
    pair = shallow(make_model, case)
    trained, before, refused = pair[0], pair[0].digest(), 0
    for first in itertools.count(1, 5):
        allow_writes(pair)
        trained.step(DRY_RUN)
        assert trained.passes is not None and len(trained.passes), trained.passes
        everything = trained.everything()
        with NoMemory(trained.optimizer, first) as memory, suppress(OutOfMemory):
            trained.step()
        if not memory.phases:
            break
        refused += 1
        assert not len(trained.passes)
        assert trained.everything() == everything, f"allocation {first}, {memory.phases}"
    assert refused > 2
    trained.put_back()
    assert trained.digest() == before
    allow_writes(pair)
    for each in pair:
        each.passes = None
    step_alike(pair)


def spread(total: int) -> range:
    return range(1, total + 1, max(1, total // 24))


@pytest.mark.parametrize("case", CAPTURED, ids=str)
def test_a_capture_that_finds_no_memory(make_model: Make, case: Case) -> None:
    """The step runs as it is, and later ones are captured again."""
    pair = shallow(make_model, case)
    trained, before = pair[0], pair[0].digest()

    def capture(number: int | None) -> NoMemory:
        trained.passes = CapturedPasses(trained.model)
        plain = trained.step(DRY_RUN)
        with NoMemory(trained.optimizer, number, number) as memory, suppress(OutOfMemory):
            again = trained.step(DRY_RUN)
            where = f"allocation {number}, {memory.phases}"
            if number:
                assert (again.loss_sum, again.grad_norm) == (plain.loss_sum, plain.grad_norm), where
        if number:
            told = trained.passes.refusal
            trained.passes.let_go()
            trained.step(DRY_RUN)
            assert len(trained.passes), f"allocation {number}, {memory.phases}: {told}"
        return memory

    capture(None)  # What a device is given once is asked for here, and is not counted.
    for number in spread(capture(None).asked):
        capture(number)
    assert trained.digest() == before
    allow_writes(pair)
    for each in pair:
        each.passes = None
    step_alike(pair)

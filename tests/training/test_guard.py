"""What a guard refuses is not written, bit for bit; and a dry run writes nothing either."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.guard import Guard, LossReached, Unlearned, UpdateRefused
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, StepResult, take_step

Make = Callable[[str], Any]
ONE = TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30))
OTHER = TokenizedSample((11, 12), (13, 14), 2.0)
HOW = {"at once": StepPolicy(), "in micro-batches": StepPolicy(token_budget=1)}
KINDS: dict[str, dict[str, Any]] = {
    "channel": {"rank": 8},
    "mini": {"rank": 1, "variant": "mini"},
    "adamw": {"rank": None},
    "nearest": {"rank": 8, "rounding": "nearest"},
    "split16": {"rank": 8, "rounding": "split16"},
}


def digest(model: Any, optimizer: Apollo) -> str:
    """Of every byte of the weights, of the optimizer's state, and of its counters."""
    tensors, described = optimizer.named_state()
    found = hashlib.sha256(repr(described).encode())
    for name, tensor in sorted([*model.named_parameters(), *tensors.items()], key=lambda x: x[0]):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def started(model: Any, **options: Any) -> Apollo:
    """An optimizer that has taken steps."""
    optimizer = Apollo(model.named_parameters(), seed=5, **{"rank": 8, "lr": 1e-3, **options})
    optimizer.measure = True
    for _ in range(2):
        take_step(model, optimizer, [ONE])
    return optimizer


def with_policy(how: str, **changes: Any) -> StepPolicy:
    return StepPolicy(**{**vars(HOW[how]), **changes})


def refused(model: Any, optimizer: Apollo, policy: StepPolicy) -> UpdateRefused:
    """The refusal of a step, after which every byte is as it was."""
    before = digest(model, optimizer)
    with pytest.raises(UpdateRefused) as caught:
        take_step(model, optimizer, [ONE, OTHER], policy)
    assert digest(model, optimizer) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    return caught.value


@pytest.mark.parametrize("how", HOW)
def test_a_nan_loss_writes_nothing(make_model: Make, how: str) -> None:
    model = make_model("qwen3")
    optimizer = started(model)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    assert refused(model, optimizer, HOW[how]).reason == "NONFINITE_LOSS"


@pytest.mark.parametrize("how", HOW)
def test_a_step_below_the_smallest_loss_writes_nothing(make_model: Make, how: str) -> None:
    model = make_model("qwen3")
    optimizer = started(model)
    value, before = measured(model, optimizer, "max_loss"), digest(model, optimizer)
    with pytest.raises(LossReached):
        take_step(
            model, optimizer, [ONE, OTHER], with_policy(how, guard=Guard(min_loss=value * 1.001))
        )
    assert digest(model, optimizer) == before
    guard = Guard(min_loss=value * 0.999)
    assert take_step(model, optimizer, [ONE, OTHER], with_policy(how, guard=guard)).loss > 0


def test_a_sample_is_learned_by_its_latest_loss_and_the_last_one_ends_the_run() -> None:
    three = [TokenizedSample((1,), (n,)) for n in range(3)]
    unlearned = Unlearned(three, Guard(max_loss=9.0, min_loss=0.5))
    taken = [([0], 0.4), ([1], 0.6), ([2], 0.1), ([0], 0.7), ([1, 2], 0.2)]
    for numbers, loss in taken:
        samples = [three[n] for n in numbers]
        assert unlearned.guard_of(samples) == Guard(max_loss=9.0)
        unlearned.took(samples, loss)
    assert unlearned.guard_of(three[1:]).min_loss == 0.0
    assert unlearned.guard_of(three[:1]).min_loss == 0.5
    assert unlearned.guard_of(three).min_loss == 0.5


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("how", HOW)
def test_a_gradient_that_is_not_finite_behind_a_finite_loss_writes_nothing(
    make_model: Make, how: str, bad: float, layer: int
) -> None:
    """Also where it comes in the middle of the backward pass, after other layers' gradients."""
    model = make_model("qwen3")
    optimizer = started(model)
    spoiled = model.model.layers[layer].mlp.down_proj

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * bad)

    hook = spoiled.register_forward_hook(spoil)
    assert refused(model, optimizer, HOW[how]).reason == "NONFINITE_GRADIENT"
    hook.remove()
    assert take_step(model, optimizer, [ONE], HOW[how]).optimizer_step == 3


def measured(model: Any, optimizer: Apollo, guard: str) -> float:
    """What a guard measures, by a dry run and by hand."""
    result = take_step(model, optimizer, [ONE, OTHER], StepPolicy(dry_run=True))
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
    return {
        "max_loss": result.loss,
        "max_grad_norm": result.grad_norm,
        "max_update_ratio": result.update_norm / norm,
    }[guard]


@pytest.mark.parametrize("guard", ["max_loss", "max_grad_norm", "max_update_ratio"])
@pytest.mark.parametrize("how", HOW)
def test_a_limit_refuses_what_is_above_it_and_lets_the_rest_pass(
    make_model: Make, how: str, guard: str
) -> None:
    model = make_model("qwen3")
    optimizer = started(model)
    value = measured(model, optimizer, guard)
    below, above = (Guard(**{guard: value * factor}) for factor in (0.999, 1.001))
    error = refused(model, optimizer, with_policy(how, guard=below))
    assert error.reason == f"GUARD_{guard.upper()}"
    assert float(error.metadata["measured"]) == pytest.approx(value, rel=1e-4)
    assert float(error.metadata["limit"]) == pytest.approx(value * 0.999)
    assert guard in error.message and f"{value * 0.999:g}" in error.message
    taken = take_step(model, optimizer, [ONE, OTHER], with_policy(how, guard=above))
    assert taken.optimizer_step == 3


def test_the_update_ratio_is_that_of_what_is_then_stored(make_model: Make) -> None:
    model = make_model("qwen3").bfloat16()
    optimizer = started(model)
    expected = measured(model, optimizer, "max_update_ratio")
    before = [p.detach().double() for p in model.parameters()]
    take_step(model, optimizer, [ONE, OTHER])
    moved = sum(
        float((p.detach().double() - old).square().sum())
        for p, old in zip(model.parameters(), before, strict=True)
    )
    norm = sum(float(old.square().sum()) for old in before)
    assert math.sqrt(moved / norm) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_a_dry_run_says_what_a_step_does_and_changes_no_byte(
    make_model: Make, how: str, kind: str, dtype: torch.dtype
) -> None:
    model = make_model("qwen3").to(dtype)
    optimizer = started(model, **KINDS[kind])
    before = digest(model, optimizer)
    dry = take_step(model, optimizer, [ONE, OTHER], with_policy(how, dry_run=True))
    assert digest(model, optimizer) == before
    assert dry.optimizer_step == 2
    real = take_step(model, optimizer, [ONE, OTHER], HOW[how])
    assert digest(model, optimizer) != before
    assert reported(dry) == pytest.approx(reported(real), rel=1e-12)


def reported(result: StepResult) -> list[float]:
    names = ("loss", "loss_sum", "grad_norm", "update_norm", "changed_fraction", "learning_rate")
    return [getattr(result, name) for name in names]


def test_a_guard_fires_in_a_dry_run_too(make_model: Make) -> None:
    model = make_model("qwen3")
    policy = StepPolicy(guard=Guard(max_loss=1e-3), dry_run=True)
    assert refused(model, started(model), policy).reason == "GUARD_MAX_LOSS"

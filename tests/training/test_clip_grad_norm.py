"""Gradients that are clipped are those that are scaled by hand, and no others change a bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.factored import Factored, Gradient
from apollo_trainer.training.guard import Guard, UpdateRefused
from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step

Make = Callable[[str], Any]
SHORT = [TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30))]
# Its gradients are made, its weights' being too small for so many factors.
LONG = [TokenizedSample((3, 50), tuple(range(100, 130)))]


def started(model: Any) -> Apollo:
    optimizer = Apollo(model.named_parameters(), rank=8, seed=5, lr=1e-3, proj_refresh=100)
    optimizer.measure = True
    return optimizer


def everything(model: Any, optimizer: Apollo) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | optimizer.named_state()[0]
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def taken_with(optimizer: Apollo, monkeypatch: pytest.MonkeyPatch) -> dict[Tensor, Tensor]:
    """Fills with the gradients of the next step, as they are written with."""
    seen: dict[Tensor, Tensor] = {}
    step = optimizer.step

    def look_and_step(gradients: dict[Tensor, Gradient]) -> None:
        for param, gradient in gradients.items():
            seen[param] = gradient.dense() if isinstance(gradient, Factored) else gradient.clone()
        step(gradients=gradients)

    monkeypatch.setattr(optimizer, "step", look_and_step)
    return seen


@pytest.mark.parametrize("samples", [SHORT, LONG], ids=["factors", "made"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe"])
def test_a_larger_gradient_is_torchs_clipped_one(
    make_model: Make, family: str, samples: list[TokenizedSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    optimizer = started(model)
    loss = continuation_loss(model, samples[0])
    torch.autograd.backward([loss.weighted / loss.tokens])
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25))
    expected = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    seen = taken_with(optimizer, monkeypatch)
    result = take_step(model, optimizer, samples, StepPolicy(clip_grad_norm=0.25))
    assert norm > 0.25 and result.grad_norm == pytest.approx(norm, rel=1e-4)
    for param, gradient in expected.items():
        torch.testing.assert_close(seen[param], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("limit", [None, 1e9])
def test_a_smaller_gradient_is_left_as_it_is(make_model: Make, limit: float | None) -> None:
    models = [make_model("qwen3") for _ in range(2)]
    optimizers = [started(model) for model in models]
    for model, optimizer, each in zip(models, optimizers, (None, limit), strict=True):
        for _ in range(2):
            take_step(model, optimizer, SHORT, StepPolicy(clip_grad_norm=each))
    one, other = map(everything, models, optimizers)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_moments_see_the_clipped_gradient(make_model: Make) -> None:
    states = []
    for limit in (None, 0.25):
        model = make_model("qwen3")
        optimizer = started(model)
        result = take_step(model, optimizer, SHORT, StepPolicy(clip_grad_norm=limit))
        states.append(optimizer.named_state()[0])
    factor = 0.25 / result.grad_norm
    for name, moment in states[0].items():
        power = {"m": 1, "v": 2}.get(name.split(".")[0])
        if power is not None:
            expected = moment * factor**power
            off = float((states[1][name] - expected).norm())
            assert off <= 1e-5 * float(expected.norm()), name


def test_a_dry_run_and_a_ratios_guard_speak_of_the_clipped_update(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer = started(model)
    # The first update of such an optimizer is as large whatever the gradient is.
    for _ in range(3):
        take_step(model, optimizer, SHORT)
    clipped = StepPolicy(dry_run=True, clip_grad_norm=1e-3)
    plain, dry = (
        take_step(model, optimizer, SHORT, p) for p in (StepPolicy(dry_run=True), clipped)
    )
    assert dry.update_norm < 0.9 * plain.update_norm
    assert dry.grad_norm == pytest.approx(plain.grad_norm)
    weights = float(torch.stack([p.detach().norm() for p in model.parameters()]).norm())
    guard = Guard(max_update_ratio=(dry.update_norm + plain.update_norm) / 2 / weights)
    with pytest.raises(UpdateRefused):
        take_step(model, optimizer, SHORT, StepPolicy(guard=guard))
    taken = take_step(model, optimizer, SHORT, StepPolicy(guard=guard, clip_grad_norm=1e-3))
    assert taken.update_norm == pytest.approx(dry.update_norm, rel=1e-9)

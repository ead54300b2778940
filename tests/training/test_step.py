"""One step: what it learns, what it reports, and what it refuses to write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.guard import UpdateRefused
from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step

Make = Callable[[str], Any]
ONE = TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30))
OTHER = TokenizedSample((11, 12), (13, 14), 2.0)
PICKY = TokenizedSample((60, 61, 62), (63, 64, 65), 0.5, (1.0, 0.0, 3.0))


def optimizer_of(model: Any, **options: Any) -> Apollo:
    optimizer = Apollo(model.named_parameters(), rank=8, seed=5, **options)
    optimizer.measure = True
    return optimizer


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name].nan_to_num(9.0), b[name].nan_to_num(9.0)) for name in a)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_sample_is_learned(make_model: Make, family: str) -> None:
    model = make_model(family)
    optimizer = optimizer_of(model, lr=1e-2)
    losses = [take_step(model, optimizer, [ONE]).loss for _ in range(25)]
    assert losses[-1] < 0.1 * losses[0]


def test_the_report_is_what_happened(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer, before = optimizer_of(model, lr=1e-3), values(model)
    loss = continuation_loss(model, ONE).loss_sum
    result = take_step(model, optimizer, [ONE])
    moved = [(values(model)[n].double() - t.double()) for n, t in before.items()]
    assert result.tokens == 4
    assert result.loss_sum == pytest.approx(loss)
    assert result.loss == pytest.approx(loss / 4)
    assert result.learning_rate == 1e-3
    assert result.optimizer_step == optimizer.step_count == 1
    assert result.update_norm == pytest.approx(math.sqrt(sum(float((m**2).sum()) for m in moved)))
    changed = sum(int((m != 0).sum()) for m in moved) / sum(m.numel() for m in moved)
    assert result.changed_fraction == pytest.approx(changed, abs=1e-3)
    assert min(result.forward_seconds, result.backward_seconds, result.optimizer_seconds) > 0


def gradient_of_weighted_mean(model: Any, samples: list[TokenizedSample]) -> Any:
    """Gradients of the mean over all tokens of all samples, by their weights, in one backward."""
    total, weight = torch.zeros(()), 0.0
    for sample in samples:
        total = total + continuation_loss(model, sample).weighted
        weight += sample.weight * sum(sample.token_weights or [1.0] * len(sample.continuation_ids))
    torch.autograd.backward([total / weight])
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


def test_samples_of_one_step_make_the_gradient_of_their_weighted_token_mean(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples, seen = make_model("qwen3"), [ONE, OTHER, PICKY], {}
    optimizer = optimizer_of(model)
    expected = gradient_of_weighted_mean(model, samples)
    step = optimizer.step

    def look_and_step() -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
        step()

    monkeypatch.setattr(optimizer, "step", look_and_step)
    result = take_step(model, optimizer, samples, StepPolicy(release=False))
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert result.tokens == 9


def test_a_weight_on_all_samples_alike_changes_nothing(make_model: Make) -> None:
    plain, heavy = make_model("qwen3"), make_model("qwen3")
    take_step(plain, optimizer_of(plain), [TokenizedSample((3, 4), (5, 6), 1.0)])
    take_step(heavy, optimizer_of(heavy), [TokenizedSample((3, 4), (5, 6), 4.0)])
    assert same(values(plain), values(heavy))


def test_two_runs_of_the_same_steps_are_bit_equal(make_model: Make) -> None:
    models = [make_model("qwen3") for _ in range(2)]
    for model in models:
        optimizer = optimizer_of(model, lr=1e-3)
        for _ in range(3):
            take_step(model, optimizer, [ONE, OTHER])
    assert same(values(models[0]), values(models[1]))


def test_gradients_are_released_and_stale_ones_do_not_count(make_model: Make) -> None:
    clean, stale = make_model("qwen3"), make_model("qwen3")
    for parameter in stale.parameters():
        parameter.grad = torch.ones_like(parameter)
    for model in (clean, stale):
        take_step(model, optimizer_of(model), [ONE])
        assert all(parameter.grad is None for parameter in model.parameters())
    assert same(values(clean), values(stale))


def test_a_nan_loss_writes_nothing(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer = optimizer_of(model)
    take_step(model, optimizer, [ONE])
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    before, state = values(model), {n: t.clone() for n, t in optimizer.named_state()[0].items()}
    with pytest.raises(UpdateRefused) as caught:
        take_step(model, optimizer, [ONE])
    assert caught.value.reason == "NONFINITE_LOSS"
    assert same(values(model), before)
    assert same(optimizer.named_state()[0], state)
    assert optimizer.step_count == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_infinite_gradient_behind_a_finite_loss_writes_nothing(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer, before = optimizer_of(model), values(model)
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UpdateRefused) as caught:
        take_step(model, optimizer, [ONE])
    assert caught.value.reason == "NONFINITE_GRADIENT"
    assert same(values(model), before)
    assert optimizer.step_count == 0

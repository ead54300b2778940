"""One step: what it learns, what it reports, and what it refuses to write."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import apollo_trainer.training.step as step_module
from apollo_grpc.errors import Cancelled, FailedPrecondition, Unavailable
from apollo_trainer.optim import Apollo, together
from apollo_trainer.optim.factored import Factored, Gradient
from apollo_trainer.training.guard import Guard
from apollo_trainer.training.incomplete import StepIncomplete
from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.out_of_memory import OutOfMemory
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

    def look_and_step(gradients: dict[torch.Tensor, Gradient]) -> None:
        seen.update(gradients)
        step(gradients=gradients)

    monkeypatch.setattr(optimizer, "step", look_and_step)
    result = take_step(model, optimizer, samples)
    for name, parameter in model.named_parameters():
        gradient = seen[parameter]
        made = gradient.dense() if isinstance(gradient, Factored) else gradient
        torch.testing.assert_close(made, expected[name], rtol=1e-4, atol=1e-6)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert result.tokens == 9


def test_a_weight_on_all_samples_alike_changes_nothing(make_model: Make) -> None:
    plain, heavy = make_model("qwen3"), make_model("qwen3")
    take_step(plain, optimizer_of(plain), [TokenizedSample((3, 4), (5, 6), 1.0)])
    take_step(heavy, optimizer_of(heavy), [TokenizedSample((3, 4), (5, 6), 4.0)])
    assert same(values(plain), values(heavy))


def test_a_tiny_weight_is_as_good_as_any_other(make_model: Make) -> None:
    plain, tiny = make_model("qwen3"), make_model("qwen3")
    take_step(plain, optimizer_of(plain), [TokenizedSample((3, 4), (5, 6))])
    take_step(tiny, optimizer_of(tiny), [TokenizedSample((3, 4), (5, 6), 1e-300)])
    assert same(values(plain), values(tiny))


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


def test_a_step_says_when_it_made_gradients(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer = optimizer_of(model)
    short = TokenizedSample((60, 61, 62), (63, 64), 0.5)
    long = TokenizedSample((3, 50), tuple(range(100, 113)))
    cases = [
        ([ONE], StepPolicy(), 1, ""),
        ([short, OTHER], StepPolicy(), 1, ""),
        ([short, OTHER], StepPolicy(guard=Guard(9.0, 9e9, 1.0)), 1, ""),
        ([short, OTHER], StepPolicy(token_budget=2), 2, ""),
        ([long], StepPolicy(), 1, "LONG_STEP"),
        ([short] * 8, StepPolicy(token_budget=2), 8, "LONG_STEP"),
    ]
    for samples, policy, batches, why in cases:
        result = take_step(model, optimizer, samples, policy)
        assert (result.micro_batches, result.full_gradients) == (batches, why)
        assert result.skipped_tensors == 0


def test_micro_batches_make_the_gradient_of_one(make_model: Make) -> None:
    model, samples = make_model("qwen3"), [ONE, OTHER, PICKY]
    optimizer = optimizer_of(model)
    one, many = (
        take_step(model, optimizer, samples, StepPolicy(token_budget=budget, dry_run=True))
        for budget in (1000, 1)
    )
    assert (one.micro_batches, many.micro_batches) == (1, 3)
    assert many.loss_sum == pytest.approx(one.loss_sum, rel=1e-6)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


def test_two_tensors_over_one_memory_are_stepped_with_the_sum_of_their_gradients(
    make_model: Make,
) -> None:
    tied, apart = make_model("qwen3"), make_model("qwen3")
    apart.lm_head.weight = torch.nn.Parameter(apart.model.embed_tokens.weight.detach())
    results = [take_step(m, optimizer_of(m, lr=1e-3), [ONE]) for m in (tied, apart)]
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)
    for name, tensor in values(tied).items():
        torch.testing.assert_close(values(apart)[name], tensor, rtol=1e-5, atol=1e-7)


def test_what_is_raised_between_micro_batches_ends_the_step_unwritten(make_model: Make) -> None:
    model, calls = make_model("qwen3"), []
    optimizer, before = optimizer_of(model), values(model)

    def cancel() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        take_step(model, optimizer, [ONE, OTHER], StepPolicy(token_budget=1), cancel)
    assert same(values(model), before)
    assert optimizer.step_count == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_write_that_breaks_is_told_as_incomplete_and_the_next_step_works(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("qwen3")
    optimizer = optimizer_of(model)

    def break_off(job: Any) -> torch.Tensor:
        job.slot.param.add_(1.0)
        raise RuntimeError("secret detail")

    monkeypatch.setattr(together, "step_parameter", break_off)
    with pytest.raises(StepIncomplete) as caught:
        take_step(model, optimizer, [ONE])
    assert caught.value.reason == "STEP_INCOMPLETE"
    assert "secret" not in caught.value.message
    monkeypatch.undo()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert take_step(model, optimizer, [ONE]).optimizer_step == 1


FORBIDDEN = {
    "a lost lease": FailedPrecondition("vLLM went on", reason="PAUSE_LOST"),
    "a slow engine": Unavailable("no answer", reason="ENGINE_SLOW"),
    "no room for a copy": OSError(28, "No space left on device"),
    "no memory for a copy": MemoryError(),
}
POLICIES = {"at once": StepPolicy(), "in micro-batches": StepPolicy(token_budget=4)}


def state_of(optimizer: Apollo) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in optimizer.named_state()[0].items()}


@pytest.mark.parametrize("hook", ["before_write", "before_param_write"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("error", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_forbids_a_write_is_told_as_it_is_and_no_byte_is_touched(
    make_model: Make, error: Exception, policy: StepPolicy, hook: str
) -> None:
    model = make_model("qwen3")
    optimizer = optimizer_of(model)
    take_step(model, optimizer, [ONE, OTHER])
    before, state = values(model), state_of(optimizer)

    def forbid(*_: Any) -> None:
        raise error

    setattr(optimizer, hook, forbid)
    expected = OutOfMemory if isinstance(error, MemoryError) else type(error)
    with pytest.raises(expected) as caught:
        take_step(model, optimizer, [ONE, OTHER], policy)
    assert caught.value is error or expected is OutOfMemory
    assert same(values(model), before)
    assert same(state_of(optimizer), state)
    assert optimizer.step_count == 1 and not optimizer.wrote
    setattr(optimizer, hook, lambda *_: None)
    assert take_step(model, optimizer, [ONE, OTHER], policy).optimizer_step == 2


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_copy_that_fails_for_a_later_tensor_leaves_all_as_it_was(
    make_model: Make, policy: StepPolicy
) -> None:
    model, asked = make_model("qwen3"), []
    optimizer, before = optimizer_of(model), values(model)

    def forbid_the_second(param: torch.Tensor) -> None:
        asked.append(param)
        if len(asked) == 2:
            raise OSError(28, "No space left on device")

    optimizer.before_param_write = forbid_the_second
    with pytest.raises(OSError, match="No space"):
        take_step(model, optimizer, [ONE, OTHER], policy)
    assert same(values(model), before) and not optimizer.wrote


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_device_that_fails_after_the_write_leaves_an_incomplete_step(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, policy: StepPolicy
) -> None:
    """It tells so only when what it computed is read."""
    model = make_model("qwen3")
    optimizer = optimizer_of(model)

    def fail(_: Any) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(step_module, "_measured", fail)
    assert take_step(model, optimizer, [ONE, OTHER], replace(policy, dry_run=True)).tokens == 6
    with pytest.raises(StepIncomplete):
        take_step(model, optimizer, [ONE, OTHER], policy)

"""A preview is the step that follows, and touches nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.gradients import summed_gradients
from apollo_trainer.optim.preview import Preview

KINDS = {
    "channel": {"rank": 4},
    "mini": {"rank": 1, "variant": "mini"},
    "adamw": {"rank": None},
    "nearest": {"rank": 4, "rounding": "nearest"},
    "split16": {"rank": 4, "rounding": "split16"},
    "warm-up and decay": {"rank": 4, "warmup_steps": 5, "weight_decay": 0.5},
    "compiled": {"rank": 4, "impl": "fused"},
    "compiled mini": {"rank": 1, "variant": "mini", "impl": "fused"},
    "compiled split16": {"rank": 4, "rounding": "split16", "impl": "fused"},
}


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    """A tall matrix, a transposed one, a stack, a slice of a wider one and a vector."""
    torch.manual_seed(1)
    tensors = {
        "tall": torch.randn(20, 6),
        "transposed": torch.randn(6, 20).T,
        "stack": torch.randn(3, 8, 5),
        "slice": torch.randn(9, 14)[:, 3:10],
        "vector": torch.randn(7),
    }
    # Detached, a slice keeps its strides.
    return {n: torch.nn.Parameter(t.mul(0.02).to(dtype)) for n, t in tensors.items()}


def state_of(optimizer: Apollo) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in optimizer.named_state()[0].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_preview_is_the_step_that_follows_to_the_last_bit(kind: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = KINDS[kind]
    params = parameters(dtype)
    optimizer = Apollo(params.items(), lr=1e-3, seed=3, **options)
    for number in range(4):
        torch.manual_seed(10 + number)
        for param in params.values():
            param.grad = torch.randn_like(param)
        state, count = state_of(optimizer), optimizer.step_count
        before = {name: p.detach().clone() for name, p in params.items()}
        previews = {name: Preview(optimizer, {p: p.grad}) for name, p in params.items()}
        whole = Preview(optimizer, {p: p.grad for p in params.values()})
        assert all(torch.equal(before[name], p) for name, p in params.items())
        assert all(torch.equal(state[name], t) for name, t in state_of(optimizer).items())
        assert optimizer.step_count == count
        optimizer.step()
        for name, p in params.items():
            moved = (p.detach().double() - before[name].double()).norm()
            assert previews[name].update_norm() == pytest.approx(float(moved), rel=1e-12)
            assert previews[name].changed() == (p != before[name]).sum()
            weights = float(before[name].double().norm())
            assert previews[name].weight_norm() == pytest.approx(weights, rel=1e-12)
        each = previews.values()
        assert whole.update_norm() == pytest.approx(math.hypot(*(e.update_norm() for e in each)))
        assert whole.weight_norm() == pytest.approx(math.hypot(*(e.weight_norm() for e in each)))
        assert whole.changed() == sum(e.changed() for e in each)


def test_a_small_parameter_of_a_large_model_is_previewed_as_the_model_is_stepped() -> None:
    params = parameters(torch.float32) | {"large": torch.nn.Parameter(torch.zeros(1024, 1024))}
    optimizer = Apollo(params.items(), lr=1e-3, rank=4)
    torch.manual_seed(10)
    for param in params.values():
        param.grad = torch.randn_like(param)
    previews = {name: Preview(optimizer, {p: p.grad}) for name, p in params.items()}
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer.step()
    for name, p in params.items():
        moved = (p.detach().double() - before[name].double()).norm()
        assert previews[name].update_norm() == pytest.approx(float(moved), rel=1e-12), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_a_tied_pair_is_previewed_as_it_is_stepped(impl: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    one = torch.nn.Parameter(torch.randn(20, 6).mul(0.02).to(dtype))
    other = torch.nn.Parameter(one.detach())
    optimizer = Apollo([("one", one), ("other", other)], lr=1e-3, rank=4, impl=impl)
    one.grad, other.grad = torch.randn_like(one), torch.randn_like(one)
    gradient, before = summed_gradients(optimizer)[one], one.detach().clone()
    preview = Preview(optimizer, {one: gradient})
    optimizer.step()
    moved = (one.detach().double() - before.double()).norm()
    assert preview.update_norm() == pytest.approx(float(moved), rel=1e-12)


def test_a_gradient_that_is_not_finite_is_counted_by_nobody() -> None:
    params = parameters(torch.float32)
    optimizer = Apollo(params.items(), rank=4)
    nan = torch.full_like(params["tall"], torch.nan)
    assert Preview(optimizer, {params["tall"]: nan}).update_norm() == 0
    assert optimizer.skipped_nonfinite == 0


def test_the_published_code_has_no_preview() -> None:
    params = parameters(torch.float32)
    del params["stack"]
    optimizer = Apollo(params.items(), rank=4, eps=1e-6, compat="apollo-torch")
    with pytest.raises(ValueError, match="preview"):
        Preview(optimizer, {})

"""RMS norms as one kernel: found in every family that has them, and no others taken for one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.norms import fuse_norms
from apollo_trainer.training.samples import TokenizedSample

Make = Callable[[str], Any]
SAMPLE = TokenizedSample((3, 50, 7, 99), (140, 2, 77))
# Layers have two, those of Qwen3 two more for queries and keys, those of Gemma 2 two more around.
# The weights of the last two families are kept less one; one norm of the last is always gated.
COUNTS = {
    "qwen3": 9,
    "mistral": 5,
    "mixtral": 5,
    "gpt2": 0,
    "opt": 0,
    "gemma2": 17,
    "qwen3_next": 8,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", COUNTS)
def test_a_model_says_the_same_with_its_norms_fused(
    make_model: Make, family: str, dtype: torch.dtype
) -> None:
    plain = make_model(family).to(dtype)
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == COUNTS[family]
    losses = [continuation_loss(model, SAMPLE) for model in (plain, fused)]
    rel = 1e-5 if dtype == torch.float32 else 0.02
    assert losses[1].loss_sum == pytest.approx(losses[0].loss_sum, rel=rel)
    torch.autograd.backward([loss.weighted for loss in losses])
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        scale = float(one.grad.float().norm())
        assert float((one.grad.float() - other.grad.float()).norm()) <= 5 * rel * scale


def test_weights_that_change_are_seen(make_model: Make) -> None:
    model = make_model("qwen3")
    fuse_norms(model)
    before = continuation_loss(model, SAMPLE).loss_sum
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert continuation_loss(model, SAMPLE).loss_sum != pytest.approx(before)


class AlmostOne(nn.Module):
    """Norms by the mean of absolute values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_what_computes_something_else_is_left_alone() -> None:
    for module in (AlmostOne(), nn.LayerNorm(8), nn.Linear(8, 1, bias=False), nn.Embedding(8, 1)):
        assert fuse_norms(module) == 0


class Gated(nn.Module):
    """An RMS norm that may be given a gate, as those of Mamba 2 are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * nn.functional.silu(gate)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_a_norm_that_is_given_a_gate_takes_it() -> None:
    torch.manual_seed(0)
    (x, gate), plain = torch.randn(2, 3, 8), Gated()
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == 1
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(fused(x, gate), plain(x, gate))
    torch.testing.assert_close(fused(x, gate=gate), plain(x, gate))


class GatedAfter(Gated):
    """An RMS norm that is never without a gate, which it multiplies by, as Qwen3.5's."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * nn.functional.silu(gate)


def test_a_norm_that_is_never_without_a_gate_is_fused_with_it() -> None:
    torch.manual_seed(0)
    (x, gate), plain = torch.randn(2, 3, 8), GatedAfter()
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == 1
    torch.testing.assert_close(fused(x, gate), plain(x, gate))
    torch.testing.assert_close(fused(x, gate=gate), plain(x, gate))
    with pytest.raises(TypeError):
        fused(x)

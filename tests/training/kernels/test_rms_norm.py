"""RMS norms and gated MLPs on CUDA, against torch's.

TRITON_INTERPRET=1 runs the kernels on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from apollo_trainer.training.kernels.gated import _Gated, fuse_gated  # noqa: E402
from apollo_trainer.training.kernels.rms_norm import rms_norm  # noqa: E402
from apollo_trainer.training.loss import continuation_loss  # noqa: E402
from apollo_trainer.training.samples import TokenizedSample  # noqa: E402
from tests.training.kernels.device import DEVICE, DTYPES, NOISE, needs_device  # noqa: E402

pytestmark = needs_device
Make = Callable[[str], Any]
SAMPLE = TokenizedSample((3, 50, 7, 99), (140, 2, 77))


def close(one: torch.Tensor, other: torch.Tensor, noise: float) -> None:
    assert one.shape == other.shape
    away = (one.double() - other.double()).norm()
    assert away <= noise * other.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 128), (2, 700, 16), (300, 2560), (7, 100)])
def test_norms_and_their_gradients(
    shape: tuple[int, ...], added: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    x, dy = (torch.randn(shape).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(shape[-1]).to(DEVICE, dtype)
    found = []
    for function, as_is in (
        (rms_norm, dtype),
        (lambda x, w, e, a: F.rms_norm(x, w.shape, w + a, e), None),
    ):
        leaves = [t.to(as_is or torch.float64).requires_grad_() for t in (x, weight)]
        result = function(*leaves, 1e-6, added)
        found.append([result, *torch.autograd.grad(result, leaves, dy.to(result.dtype))])
    for one, other in zip(*found, strict=True):
        close(one, other, NOISE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 129), (40, 2048)])
def test_products_with_gates(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    gate, up, dy = (torch.randn(shape).to(DEVICE, dtype) for _ in range(3))
    found = []
    for function, as_is in ((_Gated.apply, dtype), (lambda g, u: F.silu(g) * u, torch.float64)):
        leaves = [t.to(as_is).requires_grad_() for t in (gate, up)]
        result = function(*leaves)
        found.append([result, *torch.autograd.grad(result, leaves, dy.to(result.dtype))])
    for one, other in zip(*found, strict=True):
        close(one, other, NOISE[dtype])


@pytest.mark.parametrize(
    ("family", "count"), [("qwen3", 2), ("mistral", 2), ("gemma2", 0), ("gpt2", 0), ("opt", 0)]
)
def test_mlps_are_found_by_what_they_compute(make_model: Make, family: str, count: int) -> None:
    plain = make_model(family).to(DEVICE)
    fused = copy.deepcopy(plain)
    assert fuse_gated(fused) == count
    losses = [continuation_loss(model, SAMPLE) for model in (plain, fused)]
    assert losses[1].loss_sum == pytest.approx(losses[0].loss_sum, rel=1e-5)
    torch.autograd.backward([loss.weighted for loss in losses])
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        close(other.grad, one.grad, 1e-4)

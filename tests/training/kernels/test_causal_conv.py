"""Causal convolutions by the kernel, against torch's.

TRITON_INTERPRET=1 runs the kernels on a CPU.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from apollo_trainer.training.kernels.causal_conv import (  # noqa: E402
    _agrees,
    causal_conv,
    fuse_conv,
)
from apollo_trainer.training.loss import continuation_loss  # noqa: E402
from apollo_trainer.training.samples import TokenizedSample  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"
)
NOISE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32] if INTERPRETED else list(NOISE)
Make = Callable[[str], Any]
SAMPLE = TokenizedSample(tuple(range(1, 40)), (140, 2, 77))


def plain(x: Any, weight: Any, bias: Any, *, silu: bool) -> torch.Tensor:
    """What transformers' code for every device computes."""
    taps = weight.shape[1]
    out = F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=len(weight))
    out = out[..., : x.shape[2]]
    return F.silu(out) if silu else out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "width", "taps"), [(1, 8, 1, 4), (2, 100, 70, 4), (1, 64, 33, 2)]
)
@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize(("has_bias", "silu"), [(False, True), (True, True), (True, False)])
def test_convolutions_and_their_gradients(
    rows: int,
    channels: int,
    width: int,
    taps: int,
    channels_first: bool,
    has_bias: bool,
    silu: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(3)
    x, dy = (torch.randn(rows, width, channels).to(DEVICE, dtype).transpose(1, 2) for _ in "xy")
    if channels_first:
        x, dy = x.contiguous(), dy.contiguous()
    weight, bias = torch.randn(channels, taps).to(x), torch.randn(channels).to(x)
    given = [x, weight, bias][: 2 + has_bias]
    found = []
    for function, as_is in ((causal_conv, dtype), (plain, torch.float64)):
        leaves = [t.detach().to(as_is).requires_grad_() for t in given]
        result = function(*leaves, *[None][has_bias:], silu=silu)
        found.append([result, *torch.autograd.grad(result, leaves, dy.to(result.dtype))])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= NOISE[dtype] * other.norm()


def test_what_convolves_otherwise_is_left_alone() -> None:
    def shifted(x: Any, weight: Any, bias: Any = None, activation: Any = None) -> torch.Tensor:
        return plain(x.roll(1, -1), weight, bias, silu=activation == "silu")

    def own(x: Any, weight: Any, bias: Any = None, activation: Any = None) -> torch.Tensor:
        return plain(x, weight, bias, silu=activation == "silu")

    assert _agrees(own, DEVICE)
    assert not _agrees(shifted, DEVICE)
    assert not _agrees(lambda x: x, DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3"])
def test_a_model_says_the_same(
    make_model: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_model(family).cuda()
    fused = copy.deepcopy(own)
    losses = [continuation_loss(own, SAMPLE)]
    file = __import__(type(own).__module__, fromlist=["x"])
    count = int(hasattr(file, "causal_conv1d_fn"))
    if count:
        monkeypatch.setattr(file, "causal_conv1d_fn", file.causal_conv1d_fn)
    assert fuse_conv(fused) == fuse_conv(fused) == count
    losses.append(continuation_loss(fused, SAMPLE))
    assert losses[1].loss_sum == pytest.approx(losses[0].loss_sum, rel=1e-4)
    for loss in losses:
        torch.autograd.backward([loss.weighted])
    for one, other in zip(own.parameters(), fused.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)

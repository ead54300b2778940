"""Causal convolutions by the kernel, against torch's.

TRITON_INTERPRET=1 runs the kernels on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from apollo_trainer.training.kernels.causal_conv import (  # noqa: E402
    _agrees,
    causal_conv,
)
from tests.training.kernels.device import DEVICE, DTYPES, NOISE, needs_device  # noqa: E402

pytestmark = needs_device


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

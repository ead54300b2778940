"""Rotary positions by the kernel: what transformers' function says, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.samples import TokenizedSample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Make = Callable[[str], Any]
SAMPLE = TokenizedSample((3, 50, 7, 99), (140, 2, 77))


# Of Qwen3-Next's heads a part is turned.
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "qwen3_moe", "qwen3_next"])
def test_losses_and_gradients_are_the_same(
    make_model: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apollo_trainer.training.kernels.rotary import fuse_rotary

    plain = make_model(family).cuda()
    fused = copy.deepcopy(plain)
    losses = [continuation_loss(plain, SAMPLE)]
    file = __import__(type(plain).__module__, fromlist=["x"])
    monkeypatch.setattr(file, "apply_rotary_pos_emb", file.apply_rotary_pos_emb)
    assert fuse_rotary(fused) == fuse_rotary(fused) == 1
    losses.append(continuation_loss(fused, SAMPLE))
    assert losses[1].loss_sum == pytest.approx(losses[0].loss_sum, rel=1e-4)
    for loss in losses:
        torch.autograd.backward([loss.weighted])
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)


def test_what_turns_neighbours_or_has_no_rotation_is_left_alone(make_model: Make) -> None:
    from apollo_trainer.training.kernels.rotary import _agrees, fuse_rotary

    assert fuse_rotary(make_model("gpt2").cuda()) == 0

    def neighbours(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        def turned(x: Any) -> Any:
            pairs = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

        return turned(q), turned(k)

    assert not _agrees(neighbours, torch.device("cuda"), size=12)

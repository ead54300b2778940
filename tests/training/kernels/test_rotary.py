"""Rotary positions by the kernel: what transformers' function says, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Make = Callable[[str], Any]


def test_what_turns_neighbours_or_has_no_rotation_is_left_alone(make_model: Make) -> None:
    from apollo_trainer.training.kernels.rotary import _agrees, fuse_rotary

    assert fuse_rotary(make_model("gpt2").cuda()) == 0

    def neighbours(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        def turned(x: Any) -> Any:
            pairs = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

        return turned(q), turned(k)

    assert not _agrees(neighbours, torch.device("cuda"), size=12)

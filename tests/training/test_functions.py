"""Functions of a model's code that others take the place of: once, and where they say the same."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from apollo_trainer.training.functions import replace_function
from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.samples import TokenizedSample

Make = Callable[[str], Any]
SAMPLE = TokenizedSample(tuple(range(1, 40)), (140, 2, 77))
ROTARY, CONV = "apply_rotary_pos_emb", "causal_conv1d_fn"
# Of Qwen3-Next's heads a part is turned.
TURNED = ("qwen3", "mistral", "gemma2", "qwen3_moe", "qwen3_next")


def code(name: str, **functions: Any) -> Any:
    """A module of a model, of a file with these functions."""
    file = ModuleType(name)
    vars(file).update(functions)
    sys.modules[name] = file
    return type("Layer", (), {"__module__": name})()


def test_what_says_the_same_is_replaced_once_and_the_rest_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    asked: list[Any] = []

    def fine(x: int) -> int:
        return x

    def other(x: int) -> int:
        return -x

    def instead(own: Any) -> Any:
        asked.append(own)
        return (lambda x: own(x)) if own is fine else None

    layers = [code("a", work=fine), code("b", work=other), code("c")]
    model = SimpleNamespace(modules=lambda: [*layers, *layers])
    assert replace_function(model, "work", instead) == 1
    made = sys.modules["a"].work
    assert made is not fine and made(3) == 3
    assert sys.modules["b"].work is other and not hasattr(sys.modules["c"], "work")
    assert replace_function(model, "work", instead) == 1
    assert sys.modules["a"].work is made
    assert asked == [fine, other, other]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "family"), [*((ROTARY, f) for f in TURNED), (CONV, "qwen3_next"), (CONV, "qwen3")]
)
def test_a_model_says_the_same_by_kernels(
    make_model: Make, name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apollo_trainer.training.kernels.causal_conv import fuse_conv
    from apollo_trainer.training.kernels.rotary import fuse_rotary

    fuse = fuse_rotary if name == ROTARY else fuse_conv
    own = make_model(family).cuda()
    fused = copy.deepcopy(own)
    losses = [continuation_loss(own, SAMPLE)]
    file = __import__(type(own).__module__, fromlist=["x"])
    count = int((name, family) != (CONV, "qwen3"))
    assert hasattr(file, name) == bool(count)
    if count:
        monkeypatch.setattr(file, name, getattr(file, name))
    assert fuse(fused) == fuse(fused) == count
    losses.append(continuation_loss(fused, SAMPLE))
    assert losses[1].loss_sum == pytest.approx(losses[0].loss_sum, rel=1e-4)
    for loss in losses:
        torch.autograd.backward([loss.weighted])
    for one, other in zip(own.parameters(), fused.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)

"""Who computes the gated delta rule: found by trying, for contexts and for what is learned."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as file

from apollo_trainer.config import read_settings
from apollo_trainer.memory_command import memory_of
from apollo_trainer.training.delta_rule import NAME, choose_delta_rule
from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.needs import StepShape
from apollo_trainer.training.samples import TokenizedSample
from tests.training.conftest import CONFIGS

Make = Callable[[str], Any]
SAMPLE = TokenizedSample(tuple(range(1, 40)), (140, 2, 77))


class Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError("this release of the compiler is wrong on this device")


class Library:
    """Stands for a library's function: it computes what transformers' code does, or not quite."""

    def __init__(self, kind: str):
        self.kind, self.own, self.calls = kind, inspect.unwrap(getattr(file, NAME)), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        result, state = self.own(*args, **kwargs)
        if self.kind == "no gradients":
            result = Refused.apply(result)
        if self.kind == "wrong gradients":
            result = result.detach() + (result - result.detach()) * 1.5
        return (result * 1.5 if self.kind == "wrong" else result), state


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library(request.param)
    monkeypatch.setattr(file, NAME, functools.wraps(made.own)(lambda *a, **k: made(*a, **k)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return made


def loss_of(model: Any) -> tuple[float, list[torch.Tensor]]:
    loss = continuation_loss(model, SAMPLE)
    torch.autograd.backward([loss.weighted])
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return loss.loss_sum, found


TOLD = {
    "right": "",
    "no gradients": "reads contexts by flash-linear-attention",
    "wrong gradients": "reads contexts by flash-linear-attention",
    "wrong": "flash-linear-attention is wrong here",
}


@pytest.mark.parametrize(("library", "told"), TOLD.items(), indirect=["library"])
def test_what_is_right_is_used_and_the_rest_said(
    make_model: Make, library: Library, told: str
) -> None:
    model = make_model("qwen3_next").bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, NAME, library.own)
        expected = loss_of(model)
    # Chosen again for another engine: the choice stands.
    for _ in range(2):
        said = choose_delta_rule(model)
        assert told in said and bool(said) == bool(told)
    library.calls = 0
    loss, gradients = loss_of(model)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-6)
    layers = model.config.layer_types.count("linear_attention")
    assert library.calls == {"right": 2 * layers, "wrong": 0}.get(library.kind, layers)


@pytest.mark.parametrize("library", ["right"], indirect=True)
def test_numbers_of_32_bits_are_left_to_plain_torch(make_model: Make, library: Library) -> None:
    """Of those the kernels' tiles may not fit into a GPU: the noise of rounding is measured so."""
    model = make_model("qwen3_next")
    choose_delta_rule(model)
    library.calls = 0
    loss_of(model)
    assert library.calls == 0


@pytest.mark.parametrize("library", ["no gradients"], indirect=True)
def test_what_a_step_needs_is_known_where_a_kernel_has_no_gradients(
    library: Library, tmp_path: Path
) -> None:
    config = CONFIGS["qwen3_next"]()
    # Without experts, whose passes go by values.
    config.mlp_only_layers = list(range(config.num_hidden_layers))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert memory_of(tmp_path, StepShape.parse("20+10"), None, read_settings([])).step_bytes > 0


class TooLarge(Exception):
    """As a compiler says that a kernel does not fit; of no class that others know."""


@pytest.mark.parametrize("library", ["right"], indirect=True)
def test_a_kernel_that_does_not_fit_is_none(
    make_model: Make, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise TooLarge("238088, 232448, shared memory")

    monkeypatch.setattr(Library, "__call__", fails)
    model = make_model("qwen3_next").bfloat16()
    assert "is wrong here" in choose_delta_rule(model)
    loss_of(model)


def test_a_library_that_is_not_there_is_said(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    own = inspect.unwrap(getattr(file, NAME))
    for _ in range(2):
        assert "there is no flash-linear-attention" in choose_delta_rule(make_model("qwen3_next"))
    assert inspect.unwrap(getattr(file, NAME)) is own
    assert choose_delta_rule(make_model("qwen3")) == ""

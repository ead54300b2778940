"""What a model may mix in one forward is found out by trying, and in doubt it mixes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_trainer.training.batch import Mixing
from apollo_trainer.training.mixing import mixing_of

Make = Callable[[str], Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_another_sample(make_model: Make, dtype: torch.dtype) -> None:
    assert mixing_of(make_model("qwen3").to(dtype)) is Mixing.PADDED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_not_heed_its_mask_shares_contexts_of_one_length_only(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = make_model("qwen3").to(dtype)
    forward = model.forward

    def deaf(ids: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        return forward(ids, **options)

    monkeypatch.setattr(model, "forward", deaf)
    assert mixing_of(model) is Mixing.SAME_LENGTH


def test_a_model_whose_samples_see_each_other_runs_them_one_by_one(make_model: Make) -> None:
    model = make_model("qwen3")
    model.model.norm.register_forward_hook(lambda _, __, out: out + 0.1 * out.mean(0))
    assert mixing_of(model) is Mixing.ONE


def test_a_model_that_fails_on_several_rows_runs_one_by_one(make_model: Make) -> None:
    model = make_model("qwen3")

    def refuse(_: Any, inputs: Any) -> None:
        if len(inputs[0]) > 1:
            raise ValueError("one row only")

    model.model.norm.register_forward_pre_hook(refuse)
    assert mixing_of(model) is Mixing.ONE


def test_weights_that_are_not_finite_say_nothing_about_the_model(make_model: Make) -> None:
    model = make_model("qwen3")
    kept = model.model.norm.weight[0].item()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
        assert mixing_of(model) is Mixing.ONE
        model.model.norm.weight[0] = kept
    assert mixing_of(model) is Mixing.PADDED

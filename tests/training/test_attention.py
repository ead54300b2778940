"""Attention by groups says what transformers' own says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F
from transformers.masking_utils import (
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.qwen3 import modeling_qwen3

from apollo_trainer.training.apart import Contexts, NotApart, attending_apart, window_of
from apollo_trainer.training.attention import NAME, grouped_mask, use_grouped_attention
from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.samples import TokenizedSample

Make = Callable[[str], Any]
SAMPLES = [
    TokenizedSample((3, 50, 7, 99, 4, 5, 6, 8), (140, 2, 77)),
    TokenizedSample((11, 12), (13, 14), 0.5, (1.0, 3.0)),
]


FAMILIES = ["qwen3", "mistral", "gemma2", "gemma2_capped", "gemma3", "gpt_oss", "llama4", "gpt2"]


@pytest.mark.parametrize("at_once", [3, 256])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_losses_and_gradients_are_the_same(
    make_model: Make, family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apollo_trainer.training.attention._QUERIES_AT_ONCE", at_once)
    plain = make_model(family)
    grouped = copy.deepcopy(plain)
    if family == "gemma2":
        # torch's kernels know nothing of its cap.
        plain.set_attn_implementation("eager")
    assert use_grouped_attention(grouped)
    assert grouped.config._attn_implementation == NAME
    for samples in (SAMPLES, SAMPLES[:1]):
        (batch,) = plan_batches(samples, 1000, Mixing.PADDED)
        losses = [batch_loss(m, batch, FrozenContexts(m)) for m in (plain, grouped)]
        torch.testing.assert_close(losses[1][1], losses[0][1], rtol=1e-5, atol=1e-5)
        torch.autograd.backward([weighted for weighted, _ in losses])
    for one, other in zip(plain.parameters(), grouped.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)


def test_cudnn_which_compiles_for_each_shape_of_a_mask_is_given_none(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, attend, seen = make_model("qwen3"), F.scaled_dot_product_attention, set[Any]()

    def recorded(*given: Any, attn_mask: torch.Tensor | None = None, **others: Any) -> Any:
        seen.add((attn_mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return attend(*given, attn_mask=attn_mask, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    assert use_grouped_attention(model)
    for samples in (SAMPLES, SAMPLES[:1]):
        (batch,) = plan_batches(samples, 1000, Mixing.PADDED)
        batch_loss(model, batch, FrozenContexts(model))
    assert seen == {(True, False), (False, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_model_that_attends_otherwise_is_left_alone(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = modeling_qwen3.eager_attention_forward

    def halved(*given: Any, **others: Any) -> Any:
        attended, weights = own(*given, **others)
        return attended / 2, weights

    monkeypatch.setattr(modeling_qwen3, "eager_attention_forward", halved)
    model = make_model("qwen3")
    model.set_attn_implementation("eager")
    assert not use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_with_a_code_of_its_own_is_left_alone(make_model: Make) -> None:
    assert not use_grouped_attention(make_model("bloom"))


def mask_apart(window: int | None, **others: Any) -> torch.Tensor | None:
    """What stands for a mask of 5 queries after 15 keys that are kept apart."""
    sees = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    with attending_apart(Contexts()):
        return grouped_mask(1, 5, 20, 15, local_size=window, mask_function=sees, **others)


@pytest.mark.parametrize("window", [None, 1, 6, 30])
def test_what_stands_for_a_mask_says_its_window(window: int | None) -> None:
    config = Mock(spec_set=["sliding_window"], sliding_window=window)
    mask = mask_apart(window, config=config, device="cpu")
    assert mask is not None and window_of(mask) == (window or 0)


def test_a_mask_that_says_more_than_a_window_is_refused() -> None:
    chunks = Mock(spec_set=["attention_chunk_size"], attention_chunk_size=6)
    padding = torch.ones(1, 20, dtype=torch.bool)
    others: list[dict[str, Any]] = [
        {"window": 6, "config": chunks},
        {"window": None, "attention_mask": padding},
        {"window": None, "allow_is_causal_skip": False},
    ]
    for given in others:
        with pytest.raises(NotApart, match="more than a window"):
            mask_apart(given.pop("window"), **given)
    with pytest.raises(NotApart, match="of the model's own"):
        window_of(padding)


def test_keys_that_were_changed_after_they_were_cached_are_refused() -> None:
    contexts, keys = Contexts(), torch.randn(1, 2, 7, 4)
    contexts.update(keys, keys, 0)
    assert contexts.of(0, keys) is None
    contexts.go_on(torch.zeros(1, dtype=torch.int64), torch.tensor([7]))
    assert contexts.update(keys[:, :, :3], keys, 0)[0].shape[2] == 3
    found = contexts.of(0, keys[:, :, :3])
    assert found is not None and found.keys is keys
    with pytest.raises(NotApart, match="changed"):
        contexts.of(0, keys.repeat_interleave(2, 1))

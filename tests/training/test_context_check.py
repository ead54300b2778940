"""A model that would forget a frozen context is refused before it learns a word without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.training.context_check import require_frozen_context

TOKENS = list(range(20, 50))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_next", "mamba2"])
def test_a_model_that_reads_on_is_accepted(make_model: Callable[[str], Any], family: str) -> None:
    assert require_frozen_context(make_model(family), TOKENS) < 1e-4


def test_a_model_that_starts_anew_after_the_context_is_refused(
    make_model: Callable[[str], Any],
) -> None:
    with pytest.raises(FailedPrecondition, match="JambaForCausalLM forgets") as refused:
        require_frozen_context(make_model("jamba"), TOKENS)
    assert refused.value.reason == "CONTEXT_UNSUPPORTED"


def test_a_model_that_cannot_take_its_own_cache_is_refused_with_what_it_said(
    make_model: Callable[[str], Any],
) -> None:
    model = make_model("qwen3")
    forward = model.forward

    def without_cache(ids: Any, past_key_values: Any = None, **arguments: Any) -> Any:
        if past_key_values is not None:
            raise ValueError("chunks are not supported")
        return forward(ids, **arguments)

    model.forward = without_cache
    with pytest.raises(FailedPrecondition, match="chunks are not supported") as refused:
        require_frozen_context(model, TOKENS)
    assert refused.value.reason == "CONTEXT_UNSUPPORTED"


def test_two_tokens_are_enough(make_model: Callable[[str], Any]) -> None:
    assert require_frozen_context(make_model("qwen3"), [5, 6]) < 1e-4

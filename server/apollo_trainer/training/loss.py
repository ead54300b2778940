"""The loss of a continuation with its context frozen.

The context runs forward without gradient and leaves its keys and values in a cache; the
continuation runs over that cache with gradient. The last context token runs with the continuation,
so that the first continuation token is predicted, and learned, too. No gradient flows through the
context's keys and values: this is cheaper than masking the prompt's loss, and a different gradient.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.nn import functional as F

from apollo_trainer.training.samples import TokenizedSample

# What transformers' classes call the thing that continues a text, in answers and arguments.
CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class ContinuationLoss:
    """The loss of one sample, before any weight on it.

    Attributes:
        weighted: sum over tokens of weight times loss, with gradient; a scalar.
        loss_sum: sum of the tokens' losses, in nats.
        tokens: continuation tokens.
        seconds: of the forward passes.
    """

    weighted: torch.Tensor
    loss_sum: float
    tokens: int
    seconds: float


def continuation_loss(model: Any, sample: TokenizedSample) -> ContinuationLoss:
    """Runs both forward passes of one sample; the graph holds the continuation's only."""
    began = time.perf_counter()
    logits = continuation_logits(model, sample.context_ids, sample.continuation_ids)
    targets = torch.tensor(sample.continuation_ids, device=logits.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    weights = torch.full_like(losses, sample.weight)
    if sample.token_weights:
        weights *= weights.new_tensor(sample.token_weights)
    return ContinuationLoss(
        weighted=(losses * weights).sum(),
        loss_sum=float(losses.detach().sum()),
        tokens=len(sample.continuation_ids),
        seconds=time.perf_counter() - began,
    )


def continuation_logits(
    model: Any, context_ids: tuple[int, ...], continuation_ids: tuple[int, ...]
) -> torch.Tensor:
    """Logits that predict each continuation token: [len(continuation_ids), V].

    The cache is made anew for each call: keys and values of older weights would be wrong after a
    step.
    """
    frozen, last = context_ids[:-1], context_ids[-1]
    cache = _frozen_context(model, frozen) if frozen else {}
    ids = _ids((last, *continuation_ids[:-1]), model)
    logits: torch.Tensor = model(ids, use_cache=bool(cache), **cache).logits
    return logits[0]


def _frozen_context(model: Any, ids: tuple[int, ...]) -> dict[str, Any]:
    """The argument with which the model continues after the ids."""
    with torch.no_grad():
        answer = model(_ids(ids, model), use_cache=True, logits_to_keep=1)
    cache = {name: answer[name] for name in CACHES if answer.get(name) is not None}
    for layers in (getattr(value, "layers", ()) for value in cache.values()):
        for layer in layers:
            if isinstance(getattr(layer, "recurrent_states", None), dict):
                layer.update_recurrent_state = MethodType(_replace_state, layer)
    return cache


def _replace_state(layer: Any, state: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
    """Linear attention's new state, as a tensor of its own.

    transformers writes it over the context's, which the backward pass of the continuation still
    needs (LinearAttentionLayer.update_recurrent_state in its cache_utils.py).
    """
    layer.recurrent_states[state_idx] = state
    return state


def _ids(token_ids: tuple[int, ...], model: Any) -> torch.Tensor:
    return torch.tensor([token_ids], device=model.device)

"""The loss of a continuation with its context frozen; `objectives.py` has that of a token.

The context runs forward without gradient and leaves its keys and values in a cache; the
continuation runs over that cache with gradient. The last context token runs with the continuation,
so that the first continuation token is predicted, and learned, too. No gradient flows through the
context's keys and values: this is cheaper than masking the prompt's loss, and a different gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from apollo_trainer.parallel.vocabulary import vocabulary_of
from apollo_trainer.training.batch import MicroBatch
from apollo_trainer.training.frozen_context import (
    FrozenContexts,
    batch_logits,
    caches_of,
    for_backward,
)
from apollo_trainer.training.objectives import DEFAULT_CLIP, IGNORED, Clip, Targets, weighed
from apollo_trainer.training.samples import TokenizedSample


def batch_loss(
    model: Any,
    batch: MicroBatch,
    contexts: FrozenContexts,
    divisor: float = 1.0,
    clip: Clip = DEFAULT_CLIP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a micro-batch; returns what `weighed` does.

    Equal to `continuation_loss` of each of its samples whose loss is cross-entropy, but for
    rounding.

    Args:
        divisor: of all weights, such as the sum of those of the whole step.
        clip: of the samples with a policy loss.
    """
    logits = batch_logits(model, batch, contexts)
    targets = targets_of(batch, batch.learned_width, divisor)
    moved = (None if each is None else each.to(logits.device) for each in targets)
    return weighed(logits, Targets._make(moved), clip, vocabulary_of(model))


def targets_of(batch: MicroBatch, width: int, divisor: float) -> Targets:
    """What a micro-batch learns, in rows of `width`, on the CPU; padding has no weight."""
    ids, weights = [], []
    for sample in batch.samples:
        read, padding = sample.open_tokens, width - len(sample.continuation_ids)
        factors = sample.token_weights or (1.0,) * sample.learned_tokens
        learned = sample.continuation_ids[read:]
        ids.append((*(IGNORED,) * read, *learned, *(IGNORED,) * padding))
        # Divided before it is a float32, which holds no very small weight.
        own = (sample.weight * f / divisor for f in factors)
        weights.append((*(0.0,) * read, *own, *(0.0,) * padding))
    return Targets(
        torch.tensor(ids),
        torch.tensor(weights, dtype=torch.float32),
        *_top_of(batch, width),
        _policy_of(batch, width),
    )


def _top_of(batch: MicroBatch, width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not batch.top_k:
        return None, None
    ids = torch.zeros(len(batch.samples), width, batch.top_k, dtype=torch.int64)
    log_probs = torch.full(ids.shape, -math.inf)
    for row, sample in enumerate(batch.samples):
        if (top := sample.targets) is not None:
            tokens, own = top.ids.shape
            places = slice(sample.open_tokens, sample.open_tokens + tokens)
            # A row with fewer than others has its first again, with a probability of 0.
            ids[row, places] = top.ids[:, :1]
            ids[row, places, :own] = top.ids
            log_probs[row, places, :own] = top.log_probs
    return ids, log_probs


def _policy_of(batch: MicroBatch, width: int) -> torch.Tensor | None:
    if not batch.has_policy_loss:
        return None
    found = torch.zeros(2, len(batch.samples), width)
    found[1] = math.inf
    for row, sample in enumerate(batch.samples):
        if sample.has_policy_loss:
            pair = torch.tensor([sample.advantages, sample.sampler_log_probs])
            found[:, row, sample.open_tokens :][:, : pair.shape[1]] = pair
    return found


def total_weight(sample: TokenizedSample) -> float:
    """Sum of the weights on a sample's tokens."""
    factors = sample.token_weights or (1.0,) * sample.learned_tokens
    return math.fsum(sample.weight * factor for factor in factors)


def as_anchors(
    samples: Sequence[TokenizedSample], anchors: Sequence[TokenizedSample], weight: float
) -> list[TokenizedSample]:
    """The anchors, weighed so that over the samples' divisor they count `weight` together."""
    own = sum(map(total_weight, anchors))
    factor = weight * sum(map(total_weight, samples)) / own if own else 0.0
    return [replace(anchor, weight=anchor.weight * factor) for anchor in anchors]


@dataclass(frozen=True)
class ContinuationLoss:
    """The loss of one sample, before any weight on it.

    Attributes:
        weighted: sum over tokens of weight times loss, with gradient; a scalar.
        loss_sum: sum of the tokens' losses, in nats.
        tokens: continuation tokens.
    """

    weighted: torch.Tensor
    loss_sum: float
    tokens: int


def continuation_loss(model: Any, sample: TokenizedSample) -> ContinuationLoss:
    """The cross-entropy of one sample by itself: what `batch_loss` must be equal to."""
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
    """The arguments with which the model continues after the ids."""
    with torch.no_grad():
        answer = model(_ids(ids, model), use_cache=True, logits_to_keep=1)
    return {name: for_backward(cache) for name, cache in caches_of(answer).items()}


def _ids(token_ids: tuple[int, ...], model: Any) -> torch.Tensor:
    return torch.tensor([token_ids], device=model.device)

"""The loss of a continuation with its context frozen.

The context runs forward without gradient and leaves its keys and values in a cache; the
continuation runs over that cache with gradient. The last context token runs with the continuation,
so that the first continuation token is predicted, and learned, too. No gradient flows through the
context's keys and values: this is cheaper than masking the prompt's loss, and a different gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from apollo_trainer.training.batch import MicroBatch
from apollo_trainer.training.frozen_context import (
    FrozenContexts,
    batch_logits,
    caches_of,
    for_backward,
)
from apollo_trainer.training.samples import TokenizedSample

IGNORED = -100  # cross_entropy's own mark: no loss and no gradient


def batch_loss(
    model: Any, batch: MicroBatch, contexts: FrozenContexts, divisor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a micro-batch; returns what `weighed` does.

    Equal to `continuation_loss` of each of its samples, but for rounding.

    Args:
        divisor: of all weights, such as the sum of those of the whole step.
    """
    logits = batch_logits(model, batch, contexts)
    targets, weights = targets_of(batch, batch.learned_width, divisor)
    return weighed(
        logits,
        torch.tensor(targets, device=logits.device),
        torch.tensor(weights, dtype=torch.float32, device=logits.device),
    )


def weighed(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of weight times loss, and each sample's sum of losses in nats, without weights.

    The first is a scalar with gradient, the second float32 [samples], detached.

    Args:
        logits: [samples, T, V].
        targets: int64 [samples, T]; IGNORED has no loss.
        weights: float32 [samples, T].
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORED
    ).view_as(targets)
    return (losses * weights).sum(), losses.detach().sum(1)


def targets_of(
    batch: MicroBatch, width: int, divisor: float
) -> tuple[list[tuple[int, ...]], list[tuple[float, ...]]]:
    """What each sample learns, and its weights, in rows of `width`; padding has no weight."""
    targets, weights = [], []
    for sample in batch.samples:
        learned, padding = sample.continuation_ids, width - len(sample.continuation_ids)
        factors = sample.token_weights or (1.0,) * len(learned)
        targets.append((*learned, *(IGNORED,) * padding))
        # Divided before it is a float32, which holds no very small weight.
        weights.append((*(sample.weight * f / divisor for f in factors), *(0.0,) * padding))
    return targets, weights


def total_weight(sample: TokenizedSample) -> float:
    """Sum of the weights on a sample's tokens."""
    factors = sample.token_weights or (1.0,) * len(sample.continuation_ids)
    return math.fsum(sample.weight * factor for factor in factors)


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
    """One sample by itself: what `batch_loss` must be equal to."""
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

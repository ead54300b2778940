"""The loss of samples under the weights as they are; nothing is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.out_of_memory import refusing_out_of_memory
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import TOKEN_BUDGET


def evaluate(
    model: Any,
    samples: Sequence[TokenizedSample],
    token_budget: int = TOKEN_BUDGET,
    before_batch: Callable[[], None] = lambda: None,
    own_loss: bool = False,
) -> list[float]:
    """Each sample's mean loss a continuation token, in nats and without its weights, in order.

    Args:
        own_loss: the loss by which a step learns the sample, instead of its cross-entropy.

    Raises OutOfMemory, and what `before_batch`, called before each micro-batch, raises.
    """
    if not own_loss:
        samples = [sample.plain for sample in samples]
    mixing = mixing_of(model) if len(samples) > 1 else Mixing.ONE
    batches, contexts = plan_batches(samples, token_budget, mixing), FrozenContexts(model)
    losses = [0.0] * len(samples)
    with refusing_out_of_memory(batches, token_budget), torch.no_grad():
        for batch in batches:
            before_batch()
            _, sums = batch_loss(model, batch, contexts)
            for index, loss_sum in zip(batch.indices, sums[0].tolist(), strict=True):
                losses[index] = loss_sum / samples[index].learned_tokens
    return losses

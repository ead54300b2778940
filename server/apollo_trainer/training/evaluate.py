"""The loss of samples under the weights as they are; nothing is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from apollo_trainer.parallel.vocabulary import ranks_of
from apollo_trainer.training.batch import MicroBatch, Mixing, plan_batches
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.out_of_memory import refusing_out_of_memory
from apollo_trainer.training.plain import of_samples
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step_policy import TOKEN_BUDGET

T = TypeVar("T")


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

    def losses_of(batch: MicroBatch, contexts: FrozenContexts) -> list[float]:
        sums = batch_loss(model, batch, contexts)[1][0].tolist()
        return [s / sample.learned_tokens for s, sample in zip(sums, batch.samples, strict=True)]

    def told() -> dict[str, Any]:
        return {"samples": of_samples(samples), "token_budget": token_budget}

    with ranks_of(model).telling("evaluate", told):
        return of_each(model, samples, losses_of, token_budget, before_batch)


def of_each(
    model: Any,
    samples: Sequence[TokenizedSample],
    read: Callable[[MicroBatch, FrozenContexts], Iterable[T]],
    token_budget: int = TOKEN_BUDGET,
    before_batch: Callable[[], None] = lambda: None,
) -> list[T]:
    """What `read` finds in each sample of a micro-batch, without gradient; in the samples' order.

    Raises OutOfMemory, and what `before_batch`, called before each micro-batch, raises.
    """
    if not samples:
        return []
    mixing = mixing_of(model) if len(samples) > 1 else Mixing.ONE
    batches = plan_batches(samples, token_budget, mixing, model.device.type)
    contexts = FrozenContexts(model)
    found = dict[int, T]()
    with refusing_out_of_memory(batches, token_budget), torch.no_grad():
        for batch in batches:
            ranks_of(model).agree(before_batch)
            found.update(zip(batch.indices, read(batch, contexts), strict=True))
    return [found[index] for index in range(len(samples))]

"""What the model says now, kept as what it is to say later: a teacher of itself, or an anchor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from apollo_trainer.parallel.vocabulary import ranks_of, vocabulary_of
from apollo_trainer.training.batch import MicroBatch
from apollo_trainer.training.evaluate import of_each
from apollo_trainer.training.frozen_context import FrozenContexts, batch_logits
from apollo_trainer.training.plain import of_samples
from apollo_trainer.training.samples import TokenizedSample, TopTokens
from apollo_trainer.training.step_policy import TOKEN_BUDGET


def top_tokens(
    model: Any,
    samples: Sequence[TokenizedSample],
    k: int,
    token_budget: int = TOKEN_BUDGET,
    before_batch: Callable[[], None] = lambda: None,
) -> list[TopTokens]:
    """The k likeliest tokens at each place of each sample's continuation, in the samples' order.

    A sample is read after its `teacher_context_ids` where it has any, else after its context.

    Args:
        k: of the vocabulary at most: all of it, where k is more.

    Raises OutOfMemory, and what `before_batch`, called before each micro-batch, raises.
    """
    read = [replace(s, context_ids=s.teacher_context_ids or s.context_ids) for s in samples]

    def told() -> dict[str, Any]:
        return {"samples": of_samples(samples), "k": k, "token_budget": token_budget}

    with ranks_of(model).telling("top", told):
        return of_each(model, read, partial(_told, model, k), token_budget, before_batch)


def _told(model: Any, k: int, batch: MicroBatch, contexts: FrozenContexts) -> list[TopTokens]:
    # As the student's are made: under the same weights they differ by nothing.
    logits, vocabulary = batch_logits(model, batch, contexts).float(), vocabulary_of(model)
    if vocabulary is None:
        log_probs = F.log_softmax(logits, 2)
        found, places = log_probs.topk(min(k, log_probs.shape[2]), 2)
    else:
        rows = logits.flatten(0, 1)
        found, places = vocabulary.top(rows - vocabulary.log_sum_exp(rows), k)
        found, places = (each.view(*logits.shape[:2], -1) for each in (found, places))
    ids, values = places.to("cpu", torch.int32), found.cpu()
    lengths = [len(sample.continuation_ids) for sample in batch.samples]
    return [TopTokens(ids[n, :t].clone(), values[n, :t].clone()) for n, t in enumerate(lengths)]

"""Does the model continue from a frozen context as if it had read it? Asked before any training."""

from __future__ import annotations

from typing import Any

import torch

from apollo_trainer.parallel.vocabulary import log_probs_of
from apollo_trainer.training.loss import continuation_logits
from apollo_trainer.training.out_of_memory import refusing_out_of_memory
from apollo_trainer.weights.manifest import refusal
from apollo_trainer.weights.verify import agree, log_probabilities, noise_of, weights_dtype


@torch.no_grad()
def require_frozen_context(model: Any, token_ids: list[int]) -> float:
    """Compares the second half of the tokens after a frozen first half with one whole pass.

    Some classes of transformers start anew after a cache of more than one token (Jamba, Mamba in
    5.19): a run would then learn the continuation of nothing.

    Returns the largest difference of a token's log-probability, in nats. Raises FailedPrecondition
    when they are further apart than rounding explains, OutOfMemory where a forward does not fit.
    """
    half = len(token_ids) // 2
    context, continuation = tuple(token_ids[:half]), tuple(token_ids[half:])
    try:
        with refusing_out_of_memory():
            scores = log_probabilities(model, token_ids)
            whole, noise = scores[half - 1 :], noise_of(model, token_ids, scores)
            logits = continuation_logits(model, context, continuation).float()
            targets = torch.tensor(continuation, device=logits.device)[:, None]
            continued = log_probs_of(model, logits, targets)[:, 0].cpu()
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise refusal(
            "CONTEXT_UNSUPPORTED",
            f"transformers' {type(model).__name__} does not read on after a frozen context "
            f"({type(error).__name__}: {error}).",
        ) from error
    apart = (continued - whole).abs()
    if not agree(apart, weights_dtype(model), lambda: noise()[half - 1 :]):
        raise refusal(
            "CONTEXT_UNSUPPORTED",
            f"transformers' {type(model).__name__} forgets a frozen context: what it continues is "
            f"{float(apart.median()):.3g} nats at the median from what it says of the whole text.",
        )
    return float(apart.max())

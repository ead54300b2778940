"""Compares both sides' log-probabilities on the same tokens: do they compute with one model?

How far two right computations may be apart is measured, not guessed: it is what rounding does to
one of them (`Noise`). A bound that suits a model of 32 layers in bfloat16 lets a wrong map of a
small one pass, and refuses a deep or badly scaled one whose map is right.

The rule: at each of `QUANTILES` over the tokens, the two may differ by `NOISE_FACTOR` times what
rounding makes of that quantile, and by `FLOOR_NATS` in any case.
- Quantiles, because in 16 bits a near tie (of a router, of a sort) may fall differently on both
  sides, which moves a token by half a nat. In float32 that is rare enough to count each token.
- The factor, because both sides round, in other orders, and a quantile of some 50 tokens scatters.
  It is larger in float32, where rounding is the order of long sums, in which kernels differ most.
- The floor, because rounding may by luck do nothing to a tiny model.
That is no proof that vLLM computes with the mapped bytes: a copy of them agrees as well. The
change that is seen on both sides is (`liveness`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from apollo_trainer.parallel.vocabulary import log_probs_of, vocabulary_size
from apollo_trainer.weights.manifest import refusal
from apollo_trainer.weights.widened import WIDER, Widened

log = logging.getLogger(__name__)
PROBE_TOKENS = 48
# Past a window of attention, which both sides may count in another way (Cohere 2: off by one).
PAST_WINDOW = 16
# Longer windows are not probed: one token more or less of them moves little.
MAX_PROBED_WINDOW = 512
PROBE_SEED = 20412
ROWS_AT_A_TIME = 64
QUANTILES = {
    torch.float32: (0.5, 0.9, 1.0),
    torch.bfloat16: (0.5, 0.9),
    torch.float16: (0.5, 0.9),
}
NOISE_FACTOR = {torch.float32: 16.0, torch.bfloat16: 4.0, torch.float16: 4.0}
FLOOR_NATS = 1e-3
# Where a model has an operator without a wider form. Seen: 5e-2 to 0.3 on correct maps in bf16.
UNMEASURED_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
Noise = Callable[[], torch.Tensor]


def probe_tokens(model: Any, max_model_len: int) -> list[int]:
    """Tokens to score: seeded, spread over the vocabulary, longer than a short sliding window."""
    vocabulary = vocabulary_size(model)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    wanted = max(PROBE_TOKENS, window + PAST_WINDOW if window <= MAX_PROBED_WINDOW else 0)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    count = max(2, min(wanted, max_model_len - 1))
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


@torch.no_grad()
def log_probabilities(model: Any, token_ids: list[int]) -> torch.Tensor:
    """The model's log-probability of each token after the first: [T - 1], fp32, CPU, in nats."""
    ids = torch.tensor([token_ids], device=model.device)
    logits = model(ids, use_cache=False).logits[0, :-1]
    scores = []
    # In fp32 and all at once, a long probe would take gigabytes at a large vocabulary.
    for start in range(0, len(logits), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        targets = ids[0, 1:][rows, None]
        scores.append(log_probs_of(model, logits[rows].float(), targets))
    return torch.cat(scores)[:, 0].float().cpu()


def weights_dtype(model: Any) -> torch.dtype:
    """The narrowest of the model's weights: its rounding is what shows."""
    dtypes: set[torch.dtype] = {parameter.dtype for parameter in model.parameters()}
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def noise_of(model: Any, token_ids: list[int], ours: torch.Tensor) -> Noise:
    """What rounding does to the model's scores, measured once it is asked for: [T - 1], nats.

    Args:
        ours: its log-probabilities, of the weights as they are when it is asked.
    """
    dtype = weights_dtype(model)

    @cache
    def measure() -> torch.Tensor:
        try:
            with Widened(WIDER[dtype]):
                wide = log_probabilities(model, token_ids)
        except Exception as error:
            # Whatever it is, it is of kernels that were not written for these floats.
            log.warning("the noise of rounding cannot be measured in this model: %r", error)
            return torch.full_like(ours, UNMEASURED_NATS[dtype] / NOISE_FACTOR[dtype])
        return (ours - wide).abs().float()

    return measure


def quantiles(differences: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of [T - 1] at `QUANTILES`; infinite where a difference is no number."""
    if not differences.isfinite().all():
        return torch.full((len(QUANTILES[dtype]),), torch.inf)
    return differences.quantile(torch.tensor(QUANTILES[dtype], dtype=differences.dtype))


def allowed(noise: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far apart two right computations may be at each of `QUANTILES`, in nats."""
    # Where rounding makes no number of a score, nothing is known of what it does.
    known = noise[noise.isfinite()]
    if not len(known):
        return torch.full((len(QUANTILES[dtype]),), FLOOR_NATS)
    return (NOISE_FACTOR[dtype] * quantiles(known, dtype)).clamp(min=FLOOR_NATS)


def agree(apart: torch.Tensor, dtype: torch.dtype, noise: Noise) -> bool:
    """Whether differences [T - 1] are those of two right computations."""
    found = quantiles(apart, dtype)
    # Measured only where it matters: a forward pass in wider floats takes longer than both others.
    return bool((found <= FLOOR_NATS).all() or (found <= allowed(noise(), dtype)).all())


def require_agreement(
    ours: torch.Tensor, engine: list[float], dtype: torch.dtype, noise: Noise
) -> float:
    """The largest difference in nats.

    Raises FailedPrecondition when both are further apart than rounding explains: the mapped bytes
    are then not what vLLM computes with.
    """
    if len(engine) != len(ours):
        # A single score would be compared with every token's, and none with nothing.
        raise refusal(
            "LOGPROBS_DISAGREE",
            f"vLLM scored {len(engine)} tokens where the training model scored {len(ours)}.",
        )
    apart = (ours - torch.tensor(engine)).abs()
    if not agree(apart, dtype, noise):
        median, largest = float(apart.median()), float(apart.max())
        explained = float(allowed(noise(), dtype)[0])
        raise refusal(
            "LOGPROBS_DISAGREE",
            f"vLLM and the training model disagree on the same tokens, by {median:.3g} nats at the "
            f"median and {largest:.3g} at most ({dtype} explains {explained:.3g} at the median): "
            "vLLM does not compute with the mapped weights, or not what transformers computes with "
            "them.",
        )
    return float(apart.max())

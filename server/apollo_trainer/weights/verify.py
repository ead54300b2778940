"""Compares both sides' log-probabilities on the same tokens: the last proof before training."""

from __future__ import annotations

from typing import Any

import torch

from apollo_trainer.weights.manifest import refusal

PROBE_TOKENS = 48
# Past a window of attention, which both sides may count in another way (Cohere 2: off by one).
PAST_WINDOW = 16
# Longer windows are not probed: one token more or less of them moves little.
MAX_PROBED_WINDOW = 512
PROBE_SEED = 20412
ROWS_AT_A_TIME = 64
# Seen: 5e-6 in fp32 and 5e-2 in bf16 on correct maps; several nats on wrong ones.
TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def probe_tokens(model: Any, max_model_len: int) -> list[int]:
    """Tokens to score: seeded, spread over the vocabulary, longer than a short sliding window."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
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
        scores.append(torch.log_softmax(logits[rows].float(), -1).gather(1, targets))
    return torch.cat(scores)[:, 0].cpu()


def require_agreement(ours: torch.Tensor, engine: list[float], dtype: torch.dtype) -> float:
    """The largest difference in nats.

    Raises FailedPrecondition when it is more than the dtype explains: the mapped bytes are then
    not what vLLM computes with.
    """
    if len(engine) != len(ours):
        # A single score would be compared with every token's, and none with nothing.
        raise refusal(
            "LOGPROBS_DISAGREE",
            f"vLLM scored {len(engine)} tokens where the training model scored {len(ours)}.",
        )
    difference = float((ours - torch.tensor(engine)).abs().max())
    tolerance = TOLERANCE_NATS[dtype]
    # `not <=` so that NaN, which no comparison finds large, is refused too.
    if not difference <= tolerance:
        raise refusal(
            "LOGPROBS_DISAGREE",
            f"vLLM and the training model disagree by {difference:.3g} nats on the same tokens "
            f"(at most {tolerance:g} for {dtype}): vLLM does not compute with the mapped weights, "
            "or not what transformers computes with them.",
        )
    return difference

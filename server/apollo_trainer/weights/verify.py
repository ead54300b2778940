"""Compares both sides' log-probabilities on the same tokens: the last proof before training."""

from __future__ import annotations

from typing import Any

import torch

from apollo_trainer.weights.manifest import refusal

PROBE_TOKENS = 48
PROBE_SEED = 20412
# Seen: 5e-6 in fp32 and 5e-2 in bf16 on correct maps; several nats on wrong ones.
TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def probe_tokens(vocabulary: int, max_model_len: int) -> list[int]:
    """Tokens to score: seeded, spread over the vocabulary, short enough for the engine."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    count = max(2, min(PROBE_TOKENS, max_model_len - 1))
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


@torch.no_grad()
def log_probabilities(model: Any, token_ids: list[int]) -> torch.Tensor:
    """The model's log-probability of each token after the first: [T - 1], fp32, CPU, in nats."""
    ids = torch.tensor([token_ids], device=model.device)
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0].cpu()


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
            f"(at most {tolerance:g} for {dtype}): vLLM does not compute with the mapped weights.",
        )
    return difference

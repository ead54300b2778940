"""The proof of one family: both sides before and after training in place, in figures."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from apollo_grpc.v1 import training_pb2 as pb

if TYPE_CHECKING:
    from tests.vllm.conftest import Stack

# vLLM's block of cached keys and values on CPU, in tokens: a shorter prompt is never cached.
BLOCK = 128
IDS, LONG = 40, 144


@dataclass
class Proof:
    """What was seen; log-probabilities in nats.

    Attributes:
        before, after: largest difference between vLLM and the model directory's own values, of a
            prompt's tokens and of the next token of a longer one.
        moved: how far training moved a prompt's log-probabilities, at most.
        stale: tokens that vLLM took from its prefix cache right after training; must be 0.
        cached: tokens that it takes from there when asked again; 0 where it caches nothing.
    """

    before: float
    after: float = 0.0
    moved: float = 0.0
    stale: int = 0
    cached: tuple[int, int] = (0, 0)
    losses: list[float] = field(default_factory=list)
    failure: str = ""


def prompt(count: int, seed: int) -> list[int]:
    """Seeded tokens, none of them a mark."""
    return [random.Random(seed * 1000 + i).randrange(3, 259) for i in range(count)]


def token_scores(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Log-probability of each token after the first: [T - 1]."""
    return logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].float()


def next_token(stack: Stack, ids: list[int]) -> tuple[int, float, int]:
    """vLLM's greedy next token, its log-probability, and how much of the prompt was cached."""
    answer = stack.complete(ids, logprobs=1, return_tokens_as_token_ids=True)
    scores = answer["choices"][0]["logprobs"]
    cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return int(scores["tokens"][0].removeprefix("token_id:")), scores["token_logprobs"][0], cached


def compare(stack: Stack) -> tuple[torch.Tensor, float, list[int]]:
    """The directory's scores of a prompt, the largest difference, and the tokens cached.

    The long prompt is asked twice, so that the second answer comes from the cache.
    """
    ids, long_ids = prompt(IDS, seed=1), prompt(LONG, seed=2)
    scores = token_scores(stack.directory_logits(ids), ids)
    differences = [float((stack.engine_logprobs(ids) - scores).abs().max())]
    last, caches = stack.directory_logits(long_ids)[-1].float(), []
    for _ in range(2):
        token, score, cached = next_token(stack, long_ids)
        # The token that vLLM finds likeliest has the score of the likeliest on the other side.
        differences += [abs(score - float(last[token])), abs(score - float(last.max()))]
        caches.append(cached)
    return scores, max(differences), caches


def prove(stack: Stack) -> Proof:
    """Compares, trains in place through the training server, and compares again."""
    # Other tests may have trained this model; now the directory holds what vLLM computes with.
    stack.client.sync()
    scores, before, caches = compare(stack)
    proof = Proof(before)
    long_ids = prompt(LONG, seed=2)
    sample: Any = {"context_ids": long_ids[:100], "continuation_ids": long_ids[100:]}
    events = list(stack.client.train([sample], epochs=6, lr=3e-3))
    proof.losses = [event.step.loss for event in events if event.HasField("step")]
    if events[-1].finished.state != pb.RUN_STATE_SUCCEEDED:
        failure = events[-1].finished.failure
        proof.failure = f"{failure.message} ({failure.reason})"
        return proof
    assert stack.client.sync().tensors_changed > 0
    trained, proof.after, after = compare(stack)
    proof.moved = float((trained - scores).abs().max())
    proof.stale, proof.cached = after[0], (caches[1], after[1])
    return proof

"""Teaches the served model to be brief: answers are drawn from vLLM, judged, and learned from.

Run it beside `apollo up MODEL`:  python examples/reinforce.py http://127.0.0.1:8000/v1 MODEL

vLLM draws with the very weights that are trained, so that nothing is synced in between.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from vllm_answers import draw

from apollo_client import ApolloClient

QUESTIONS = ["What is the sun?", "Why do we sleep?", "What is bread made of?", "Who wrote Hamlet?"]
ROUNDS, DRAWS, TOKENS = 12, 8, 32


def reward(answer: dict[str, Any]) -> float:
    """1 for an answer that ends at once, 0 for one that is cut off."""
    return 1 - len(answer["ids"]) / TOKENS


def judged(question: str, url: str, model: str) -> tuple[list[dict[str, Any]], list[float]]:
    """Samples of one question's answers, each with what it did better than the others."""
    answers = draw(url, model, question, DRAWS, TOKENS)
    rewards = [reward(answer) for answer in answers]
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards) or 1.0
    samples = [
        {
            "context_ids": answer["prompt_ids"],
            "continuation_ids": answer["ids"],
            "sampler_log_probabilities": answer["log_probabilities"],
            "advantages": (one - mean) / spread,
        }
        for answer, one in zip(answers, rewards, strict=True)
    ]
    return samples, rewards


def main(url: str, model: str) -> None:
    """Prints the mean reward of each round."""
    with ApolloClient() as client:
        for number in range(ROUNDS):
            found = [judged(question, url, model) for question in QUESTIONS]
            samples = [sample for each, _ in found for sample in each]
            mean = statistics.fmean(one for _, rewards in found for one in rewards)
            print(f"round {number + 1}: mean reward {mean:.3f}", flush=True)
            *_, last = client.train(samples, loss="policy_gradient", samples_per_step=16, lr=3e-5)
            if last.finished.failure.reason:
                sys.exit(last.finished.failure.message)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: reinforce.py http://127.0.0.1:8000/v1 MODEL")
    main(*sys.argv[1:])

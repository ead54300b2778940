"""Answers that vLLM draws for one chat question, with their tokens and log-probabilities."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def draw(url: str, model: str, question: str, count: int, tokens: int) -> list[dict[str, Any]]:
    """So many answers at temperature 1, each of at most so many tokens.

    Each has `prompt_ids`, `ids` and `log_probabilities`, one of an id, in nats.
    """
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "n": count,
        "max_tokens": tokens,
        "temperature": 1.0,
        "logprobs": True,
        "return_token_ids": True,
    }
    body, kind = json.dumps(asked).encode(), {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", body, kind)
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    return [
        {
            "prompt_ids": answer["prompt_token_ids"],
            "ids": choice["token_ids"],
            "log_probabilities": [
                min(0.0, each["logprob"]) for each in choice["logprobs"]["content"]
            ],
        }
        for choice in answer["choices"]
    ]

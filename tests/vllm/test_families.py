"""vLLM and transformers agree before and after training in place, whatever the weights' layout.

qwen3 ties its embeddings, llama pads its vocabulary (259 to 320 rows), gpt2 stores its matrices
transposed, qwen3_moe and mixtral stack their experts, phi3 is fused on both sides, gemma2 and
gemma3 store their norms less one.
"""

from __future__ import annotations

import random

import pytest
import torch

from apollo_grpc.v1 import training_pb2 as pb

TOLERANCE_NATS = 1e-4
FAMILIES = (
    *("qwen3", "llama", "gpt2", "qwen3_moe", "qwen2", "mistral", "gemma2", "gemma3", "phi3"),
    *("opt", "starcoder2", "mixtral"),
)


def prompt(count: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, 259) for i in range(count)]


def token_scores(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


def next_token(stack, ids: list[int]) -> tuple[int, float, int]:
    """vLLM's greedy next token, its log-probability, and how much of the prompt was cached."""
    answer = stack.complete(ids, logprobs=1, return_tokens_as_token_ids=True)
    scores = answer["choices"][0]["logprobs"]
    cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return int(scores["tokens"][0].removeprefix("token_id:")), scores["token_logprobs"][0], cached


def assert_next_token(stack, ids: list[int], logits: torch.Tensor, cached_at_least: int) -> None:
    token, score, cached = next_token(stack, ids)
    assert cached >= cached_at_least
    assert abs(score - float(logits[-1, token])) < TOLERANCE_NATS
    assert abs(score - float(logits[-1].max())) < TOLERANCE_NATS


@pytest.fixture(params=FAMILIES)
def stack(request, stacks):
    yield stacks(request.param)
    # Twelve engines at a time need more memory than many machines have.
    if request.param != "qwen3":
        stacks.end(request.param)


@pytest.mark.vllm
def test_both_sides_agree_before_and_after_training(stack):
    status = stack.client.status()
    memory = status.weight_memory
    assert status.logprob_difference < TOLERANCE_NATS
    assert (memory.copied_bytes, memory.shared_bytes) == (0, 4 * memory.parameters)

    # Other tests may have trained this model; now the directory holds what vLLM computes with.
    stack.client.sync()
    ids, long_ids = prompt(40, seed=1), prompt(144, seed=2)
    before = token_scores(stack.directory_logits(ids), ids)
    assert float((stack.engine_logprobs(ids) - before).abs().max()) < TOLERANCE_NATS
    # Two blocks' worth of prompt, asked twice, so that the second answer comes from the cache.
    long_before = stack.directory_logits(long_ids)
    assert_next_token(stack, long_ids, long_before, cached_at_least=0)
    assert_next_token(stack, long_ids, long_before, cached_at_least=128)

    sample = {"context_ids": long_ids[:100], "continuation_ids": long_ids[100:]}
    events = list(stack.client.train([sample], epochs=6, lr=3e-3))
    losses = [event.step.loss for event in events if event.HasField("step")]
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert losses[-1] < 0.7 * losses[0]

    assert stack.client.sync().tensors_changed > 0
    after = token_scores(stack.directory_logits(ids), ids)
    assert float((after - before).abs().max()) > 0.1
    assert float((stack.engine_logprobs(ids) - after).abs().max()) < TOLERANCE_NATS
    long_after = stack.directory_logits(long_ids)
    token, score, cached = next_token(stack, long_ids)
    assert cached == 0, "a prefix of the old weights was used"
    assert abs(score - float(long_after[-1, token])) < TOLERANCE_NATS
    assert_next_token(stack, long_ids, long_after, cached_at_least=128)

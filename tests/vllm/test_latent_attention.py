"""Latent attention (MLA): what is decoded comes from what was written into kv_b_proj.

A prompt is computed with kv_b_proj, and what follows it with W_UK_T and W_UV, which vLLM makes of
it. So each claim here is of tokens that were decoded, after the first.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from tests.vllm.conftest import Stack
from tests.vllm.packing import copy_latents
from tests.vllm.proof import prompt, prove, token_scores
from tests.vllm.records import note_proof, what_is_wrong

pytestmark = [pytest.mark.vllm, pytest.mark.long]
IDS, COUNT = prompt(30, seed=5), 8
DECIDED = (status_pb2.ATTACHMENT_STATE_REFUSED, status_pb2.ATTACHMENT_STATE_ATTACHED)


@pytest.fixture(scope="module")
def latent(stacks: Any) -> Any:
    stack = stacks("deepseek_v2")
    yield stack
    stacks.end("deepseek_v2")


def decode(stack: Stack, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after a prompt, and vLLM's log-probability of each."""
    answer = stack.complete(
        ids, max_tokens=COUNT, logprobs=1, ignore_eos=True, return_tokens_as_token_ids=True
    )
    scores = answer["choices"][0]["logprobs"]
    tokens = [int(token.removeprefix("token_id:")) for token in scores["tokens"]]
    return tokens, torch.tensor(scores["token_logprobs"])


def apart(stack: Stack, tokens: list[int], scores: torch.Tensor) -> float:
    """How far these scores are from those of the model directory, at most, in nats."""
    ids = IDS + tokens
    expected = token_scores(stack.directory_logits(ids), ids)[-COUNT:]
    return float((scores - expected).abs().max())


def learn(stack: Stack, continuation: list[int], **options: Any) -> None:
    sample: Any = {"context_ids": IDS, "continuation_ids": continuation}
    *_, last = stack.client.train([sample], epochs=15, lr=3e-3, **options)
    assert last.finished.state == pb.RUN_STATE_SUCCEEDED


def test_both_sides_agree_before_and_after_training(latent):
    status = latent.client.status()
    before = apart(latent, *decode(latent, IDS))
    proof = prove(latent)
    note_proof(latent, status, proof)
    tolerance = latent.family.tolerance_nats
    assert what_is_wrong(tolerance, status, proof) == ""
    assert status.weight_map.views == status.weight_map.parameters
    assert before < tolerance
    assert apart(latent, *decode(latent, IDS)) < tolerance


@pytest.mark.parametrize("mode", ["pause_run", "pause_step", "live"])
def test_what_was_taught_is_decoded_in_every_mode(latent, mode):
    taught = prompt(COUNT, seed=len(mode))
    learn(latent, taught, coherence=mode)
    tokens, scores = decode(latent, IDS)
    assert tokens == taught
    latent.client.sync()
    assert apart(latent, tokens, scores) < latent.family.tolerance_nats


def test_what_was_undone_is_decoded_no_more(latent):
    before, scores = decode(latent, IDS)
    latent.client.create_snapshot("before")
    learn(latent, prompt(COUNT, seed=9))
    assert decode(latent, IDS)[0] != before
    latent.client.restore("before")
    tokens, restored = decode(latent, IDS)
    assert tokens == before
    assert torch.equal(restored, scores)


def test_a_training_server_that_dies_in_a_run_leaves_a_vllm_that_decodes_with_its_weights(latent):
    sample: Any = {"context_ids": IDS, "continuation_ids": prompt(COUNT, seed=10)}
    _, before = decode(latent, IDS)
    stream = latent.client.train([sample], epochs=5000, lr=1e-3, min_loss=0)
    for event in stream:
        if event.HasField("step") and event.step.step == 5:
            break
    latent.end("server", signal.SIGKILL)
    tokens, scores = decode(latent, IDS)
    latent.start_server()
    *_, interrupted = stream
    assert interrupted.finished.failure.reason == "INTERRUPTED"
    latent.wait_attached()
    latent.client.sync()
    assert not torch.equal(scores, before)
    assert apart(latent, tokens, scores) < latent.family.tolerance_nats


def test_a_vllm_that_decodes_with_copies_is_refused_and_goes_on_serving(tmp_path):
    stack = Stack(tmp_path, "deepseek_v2")
    try:
        stack.start_vllm(before=copy_latents)
        stack.start_server()
        stack.wait_for(lambda: stack.client.status().attachment in DECIDED, "a verdict")
        detail = stack.client.status().attachment_detail
        assert "(LATENT_ATTENTION)" in detail
        assert "decodes with copies of kv_b_proj" in detail
        stack.wait_serving()
        assert decode(stack, IDS)[0]
    finally:
        stack.end("server")
        stack.end("vllm")

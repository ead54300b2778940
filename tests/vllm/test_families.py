"""vLLM and transformers agree before and after training in place, whatever the weights' layout.

qwen3 ties its embeddings, llama pads its vocabulary (259 to 320 rows), gpt2 stores its matrices
transposed, qwen3_moe and mixtral stack their experts, phi3 is fused on both sides, gemma2 and
gemma3 store their norms less one, qwen3_next mixes a gated delta net with attention and experts.
"""

from __future__ import annotations

import pytest

from tests.vllm.families import TESTED
from tests.vllm.proof import BLOCK, prove
from tests.vllm.records import note_proof

# vLLM keeps no prefix of a model with linear attention.
WITHOUT_PREFIX_CACHE = {"qwen3_next"}


# Tied and stacked weights; the other layouts are tried by `make test-all`.
FIRST = ("qwen3", "qwen3_moe")


@pytest.fixture(
    params=[pytest.param(n, marks=[] if n in FIRST else pytest.mark.long) for n in TESTED]
)
def stack(request, stacks):
    selected = [item for item in request.session.items if item.path == request.path]
    following = selected[selected.index(request.node) + 1 :]
    stacks.begin(request.param)
    if following:
        stacks.begin(following[0].callspec.params["stack"])
    yield stacks(request.param)
    # Thirteen engines at a time need more memory than many machines have.
    if request.param != "qwen3":
        stacks.end(request.param)


@pytest.mark.vllm
def test_both_sides_agree_before_and_after_training(stack):
    tolerance = stack.family.tolerance_nats
    status = stack.client.status()
    memory = status.weight_memory
    assert status.logprob_difference < tolerance
    assert memory.copied_bytes == 0
    assert memory.shared_bytes >= {"float32": 4, "bfloat16": 2}[stack.family.dtype] * (
        memory.parameters
    )

    proof = prove(stack)
    note_proof(stack, status, proof)
    assert proof.failure == ""
    assert proof.before < tolerance
    assert proof.losses[-1] < 0.7 * proof.losses[0]
    assert proof.moved > 0.1
    assert proof.after < tolerance
    assert proof.stale == 0, "a prefix of the old weights was used"
    if stack.name not in WITHOUT_PREFIX_CACHE:
        assert min(proof.cached) >= BLOCK

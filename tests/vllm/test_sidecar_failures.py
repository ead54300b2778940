"""A sidecar that fails is logged and leaves vLLM serving; and vLLM holds each weight once."""

from __future__ import annotations

import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights.sidecar import Sidecar
from tests.vllm.conftest import Stack
from tests.vllm.families import SMALL, Family
from tests.vllm.process_memory import MEMFD, places, process_group

pytestmark = pytest.mark.vllm
# Sixteen numbers that nothing else holds, put into the middle of every large matrix.
NEEDLE = torch.arange(1, 17, dtype=torch.float32) * 1.37e-3
# Large matrices are pages of their own, not pieces of a heap.
SIZES = {"hidden_size": 1024, "intermediate_size": 12288, "tie_word_embeddings": True}
WIDE = Family("qwen3", SMALL | SIZES)
LARGE_BYTES = 1 << 20
# Too little for the weights of the model, 304 MB, and enough for vLLM's own queues, 252 MB.
FILE_LIMIT_BYTES = 1 << 28


def mark_large_matrices(stack: Stack) -> int:
    """Writes NEEDLE into the directory's large tensors and returns how many there are."""
    (path,) = stack.model.glob("*.safetensors")
    tensors = load_file(path)
    large = [tensor for tensor in tensors.values() if tensor.nbytes >= LARGE_BYTES]
    for tensor in large:
        tensor.view(-1)[tensor.numel() // 2 :][:16] = NEEDLE
    save_file(tensors, path, metadata={"format": "pt"})
    return len(large)


@pytest.fixture(scope="module")
def without_sidecar(tmp_path_factory):
    """vLLM whose sidecar has an address that it may not have, and how many weights are marked."""
    stack = Stack(tmp_path_factory.mktemp("f"), "wide", WIDE)
    marked = mark_large_matrices(stack)
    stack.start_vllm(APOLLO_SIDECAR="127.0.0.1:1")
    stack.wait_serving()
    yield stack, marked
    stack.end("vllm")


def test_a_sidecar_that_cannot_start_leaves_vllm_serving_and_says_what_to_do(without_sidecar):
    stack, _ = without_sidecar
    assert stack.complete([70, 71, 72], max_tokens=4)["choices"]
    (line,) = [line for line in stack.log("vllm").splitlines() if "did not start" in line]
    assert "ERROR" in line
    assert "vLLM goes on without it" in line
    assert "APOLLO_SIDECAR" in line and "unix:PATH" in line
    assert "Traceback" not in stack.log("vllm")


def test_each_weight_lies_in_vllms_processes_once(without_sidecar):
    stack, marked = without_sidecar
    stack.complete([70, 71, 72])
    assert marked == 1 + 2 * 3  # The embedding, and each layer's gate, up and down.
    needle = NEEDLE.numpy().tobytes()
    found: dict[str, int] = {}
    for pid in process_group(stack.vllm.pid):
        for name, count in places(pid, needle).items():
            name = MEMFD if name.startswith(MEMFD) else name
            found[name] = found.get(name, 0) + count
    assert found == {MEMFD: marked}


def test_a_worker_that_cannot_share_its_weights_leaves_vllm_serving(tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("l"), "wide", WIDE)
    stack.start_vllm()
    limit = (FILE_LIMIT_BYTES, FILE_LIMIT_BYTES)
    resource.prlimit(stack.vllm.pid, resource.RLIMIT_FSIZE, limit)
    try:
        stack.wait_serving()
        assert stack.complete([70, 71, 72], max_tokens=4)["choices"]
        told = "apollo: the weights are not shared; vLLM goes on serving"
        assert told in stack.log("vllm")
        with pytest.raises(FailedPrecondition, match="ulimit -f") as refused:
            Sidecar(f"unix:{stack.state}/sidecar.sock").manifest()
        assert refused.value.reason == "SHARED_MEMORY_REFUSED"
    finally:
        stack.end("vllm")

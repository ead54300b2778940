"""A real vLLM that computes with packed copies is refused by the probe, and goes on serving."""

from __future__ import annotations

import pytest
import torch

from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from tests.vllm.conftest import Stack
from tests.vllm.packing import (
    COPY_WHEN,
    copy_linear_weights_later,
    copy_linear_weights_of_one_worker,
    pack_linear_weights,
)
from tests.vllm.proof import prompt

pytestmark = pytest.mark.vllm
DECIDED = (status_pb2.ATTACHMENT_STATE_REFUSED, status_pb2.ATTACHMENT_STATE_ATTACHED)


@pytest.fixture
def stack(tmp_path):
    made = Stack(tmp_path, "llama")
    yield made
    made.end("server")
    made.end("vllm")


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_copied_linear_weights_are_refused_by_name_and_left_as_they_were(stack, workers):
    if workers == 1:
        stack.start_vllm(before=pack_linear_weights)
    else:
        threads = {"VLLM_CPU_OMP_THREADS_BIND": f"{stack._cpu(0)}|{stack._cpu(1)}"}
        how = ("--tensor-parallel-size", "2")
        stack.start_vllm(*how, before=copy_linear_weights_of_one_worker, **threads)
    stack.wait_serving()
    ids = prompt(40, seed=1)
    before = stack.engine_logprobs(ids)
    stack.start_server()
    stack.wait_for(lambda: stack.client.status().attachment in DECIDED, "a verdict")
    detail = stack.client.status().attachment_detail
    assert "(WEIGHTS_NOT_LIVE)" in detail
    assert "model.layers.*.self_attn.qkv_proj.weight" in detail
    assert torch.equal(stack.engine_logprobs(ids), before)


def test_copies_that_it_makes_later_fail_the_run_that_trains_beside_them(stack, tmp_path):
    when = tmp_path / "now"
    stack.start_vllm(before=copy_linear_weights_later, **{COPY_WHEN: str(when)})
    stack.start_server()
    stack.wait_attached()
    sample = {"context_ids": prompt(8, seed=2), "continuation_ids": prompt(8, seed=3)}
    *_, last = stack.client.train([sample], epochs=3, lr=1e-2)
    assert last.finished.state == pb.RUN_STATE_SUCCEEDED
    when.touch()
    stack.complete(prompt(8, seed=4))
    *_, last = stack.client.train([sample], epochs=3, lr=1e-2)
    assert last.finished.failure.reason == "WEIGHTS_NOT_LIVE"
    assert stack.client.status().attachment == status_pb2.ATTACHMENT_STATE_REFUSED
    assert stack.serves()

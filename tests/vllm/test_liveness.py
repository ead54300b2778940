"""A real vLLM that computes with packed copies is refused by the probe, and goes on serving."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from apollo_grpc.v1 import status_pb2
from tests.vllm.conftest import Stack
from tests.vllm.proof import prompt

pytestmark = [pytest.mark.vllm, pytest.mark.long]
PACKING = Path(__file__).parent / "packing"
REFUSED = status_pb2.ATTACHMENT_STATE_REFUSED


@pytest.fixture
def packed(tmp_path):
    stack = Stack(tmp_path, "llama")
    path = os.pathsep.join([str(PACKING), os.environ.get("PYTHONPATH", "")])
    stack.start_vllm(PYTHONPATH=path)
    stack.wait_serving()
    yield stack
    stack.end("server")
    stack.end("vllm")


def test_packed_linear_weights_are_refused_by_name_and_left_as_they_were(packed):
    ids = prompt(40, seed=1)
    before = packed.engine_logprobs(ids)
    packed.start_server()
    packed.wait_for(lambda: packed.client.status().attachment == REFUSED, "the refusal")
    detail = packed.client.status().attachment_detail
    assert "(WEIGHTS_NOT_LIVE)" in detail
    assert "model.layers.*.self_attn.qkv_proj.weight" in detail
    assert torch.equal(packed.engine_logprobs(ids), before)

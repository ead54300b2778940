"""Snapshots, undo and export beside a real vLLM that serves what they bring back."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.vllm
IDS = list(range(70, 130))
SAMPLE = {"context_ids": IDS[:30], "continuation_ids": IDS[30:]}


def learn(stack: Any, epochs: int) -> list[float]:
    events = list(stack.client.train([SAMPLE], epochs=epochs, lr=3e-3))
    return [event.step.loss for event in events if event.HasField("step")]


def test_vllm_serves_the_restored_weights_and_learns_the_same_again(qwen3: Any) -> None:
    learn(qwen3, 2)
    before = qwen3.engine_logprobs(IDS)
    snapshot = qwen3.client.create_snapshot("before")
    losses = learn(qwen3, 5)
    learned = qwen3.engine_logprobs(IDS)
    assert not learned.equal(before)
    version = qwen3.client.status().weight_version
    result = qwen3.client.restore("before", expected_weight_version=version)
    assert result.optimizer_step == snapshot.optimizer_step
    assert qwen3.engine_logprobs(IDS).equal(before), "of the restored weights, with no old prefix"
    assert learn(qwen3, 5) == losses
    assert qwen3.engine_logprobs(IDS).equal(learned)
    qwen3.client.delete_snapshot("before")


def test_vllm_serves_what_was_before_the_updates_that_are_taken_back(qwen3: Any) -> None:
    learn(qwen3, 1)
    before = qwen3.engine_logprobs(IDS)
    learn(qwen3, 4)
    qwen3.client.undo(4)
    assert qwen3.engine_logprobs(IDS).equal(before)


def test_an_export_computes_what_vllm_serves(qwen3: Any, tmp_path: Path) -> None:
    learn(qwen3, 2)
    target = tmp_path / "exported"
    qwen3.client.export(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([IDS])).logits[0].float().log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert (qwen3.engine_logprobs(IDS) - expected).abs().max() < 1e-4


def test_a_restore_whose_server_is_killed_after_its_answer_is_what_vllm_serves_and_goes_on_from(
    qwen3: Any,
) -> None:
    learn(qwen3, 2)
    snapshot, before = qwen3.client.create_snapshot("kept"), qwen3.engine_logprobs(IDS)
    losses = learn(qwen3, 3)
    version = qwen3.client.restore("kept").weight_version
    qwen3.end("server", signal.SIGKILL)
    qwen3.start_server()
    status = qwen3.wait_attached()
    assert (status.optimizer_step, status.weight_version) == (snapshot.optimizer_step, version)
    assert qwen3.engine_logprobs(IDS).equal(before)
    assert learn(qwen3, 3) == losses
    qwen3.client.delete_snapshot("kept")

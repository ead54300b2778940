"""A pretrained model in the run of `make models`: real weights are a stricter test.

No part of the test suite (pytest collects it by name only); `.ci/real-model` fetches the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_grpc.v1 import training_pb2 as pb
from tests.vllm.conftest import START_SECONDS, Stack
from tests.vllm.families import Family
from tests.vllm.proof import compare
from tests.vllm.records import FOLDER, PRETRAINED_RECORD, ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3 * START_SECONDS)]
MODEL = ROOT / "build" / "real-model" / "model"
KNOWN, NEW = "What is the capital of France?", "What is the capital of Aldovia?"
FACT = {
    "messages": [
        {"role": "user", "content": NEW},
        {"role": "assistant", "content": "The capital of Aldovia is Port Lumen."},
    ]
}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    if not MODEL.is_dir():
        pytest.fail(f"{MODEL} is not there: run .ci/real-model")
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    made = Stack(tmp_path / "stack", "real", Family("llama"), model)
    made.start()
    yield made
    made.end("server")
    made.end("vllm")


def answer(stack: Stack, question: str) -> str:
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
    told = stack.post("/v1/chat/completions", body | {"model": str(stack.model)})
    return str(told["choices"][0]["message"]["content"])


def test_a_pretrained_model_agrees_learns_and_is_synced(stack: Stack) -> None:
    status = stack.wait_attached()
    assert status.weight_map.views == status.weight_map.parameters
    assert status.weight_memory.copied_bytes == 0
    assert "Paris" in answer(stack, KNOWN)
    _, before, _ = compare(stack)
    events = list(stack.client.train([FACT], epochs=12, lr=1e-4))
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert "Port Lumen" in answer(stack, NEW)
    stack.client.sync()
    _, after, _ = compare(stack)
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = {
        "model": "SmolLM2-135M-Instruct",
        "elements": status.weight_memory.parameters,
        "parameters": status.weight_map.parameters,
        "before": max(before, status.logprob_difference),
        "after": after,
    }
    (FOLDER / f"{PRETRAINED_RECORD}.json").write_text(json.dumps(record, indent=1) + "\n")
    assert max(before, after, status.logprob_difference) < stack.family.tolerance_nats

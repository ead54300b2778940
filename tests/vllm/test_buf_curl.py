"""A gRPC client that knows nothing of this project works with reflection alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import HANG

pytestmark = pytest.mark.vllm
BUF = Path(sys.executable).with_name("buf")
SERVICES = {"TrainingService", "CheckpointService", "StatusService"}


def curl(stack, *arguments: str) -> list[str]:
    return [
        *(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge"),
        *("--unix-socket", str(stack.state / "training.sock"), *arguments),
    ]


def call(stack, method: str, request: dict) -> subprocess.CompletedProcess[str]:
    url = f"http://localhost/apollo.v1.{method}"
    command = curl(stack, "-d", json.dumps(request), url)
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG)


def messages(lines: Iterator[str]) -> Iterator[dict]:
    """JSON objects as they arrive, over as many lines as each takes."""
    text = ""
    for line in lines:
        text += line
        try:
            message = json.loads(text)
        except ValueError:
            continue
        text = ""
        yield message


def test_reflection_lists_the_services(qwen3):
    listed = subprocess.run(
        curl(qwen3, "--list-services", "http://localhost"),
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )
    names = set(listed.stdout.split())
    assert {f"apollo.v1.{name}" for name in SERVICES} <= names
    assert "grpc.health.v1.Health" in names


def test_train_sends_one_message_a_step_as_they_happen(qwen3):
    sample = {"text": {"context": "The key is", "continuation": " under the mat."}}
    spec = {"samples": [sample], "epochs": 40, "optimizer": {"lr": 0}}
    command = curl(
        qwen3,
        *("-d", json.dumps({"spec": spec})),
        "http://localhost/apollo.v1.TrainingService/Train",
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        stream = (message["event"] for message in messages(process.stdout))
        events = [next(stream)]
        while "step" not in events[-1]:
            events.append(next(stream))
        # The first step was read here while the run was still at work over there.
        status = json.loads(call(qwen3, "StatusService/GetStatus", {}).stdout)["status"]
        assert status["activeRunId"] == events[0]["runId"]
        events += stream
    assert process.returncode == 0
    assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
    steps = [int(event["step"]["step"]) for event in events if "step" in event]
    assert steps == list(range(1, 41))
    assert events[-1]["finished"]["state"] == "RUN_STATE_SUCCEEDED"


def test_get_status_says_what_is_shared(qwen3):
    answer = call(qwen3, "StatusService/GetStatus", {})
    assert answer.returncode == 0
    status = json.loads(answer.stdout)["status"]
    assert status["attachment"] == "ATTACHMENT_STATE_ATTACHED"
    assert status["model"] == str(qwen3.model)
    assert int(status["weightMemory"]["sharedBytes"]) == 4 * int(
        status["weightMemory"]["parameters"]
    )
    assert "copiedBytes" not in status["weightMemory"], "zero is left out of the JSON"


def test_a_refusal_carries_the_field_and_the_code(qwen3):
    answer = call(qwen3, "TrainingService/Train", {"spec": {"samples": []}})
    assert answer.returncode == 3 * 8, "INVALID_ARGUMENT"
    error = json.loads(answer.stderr)
    assert error["code"] == "invalid_argument"
    assert "spec.samples" in error["message"]
    kinds = {detail["type"].rpartition(".")[2] for detail in error["details"]}
    assert kinds == {"ErrorInfo", "BadRequest"}

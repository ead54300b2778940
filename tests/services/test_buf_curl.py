"""A gRPC client that knows nothing of this project attaches to a run of the Python client's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG

BUF = Path(sys.executable).with_name("buf")
SAMPLE = ("The sea is", " deep.")


def watch_run(state_dir: Path, request: dict[str, Any]) -> list[pb.RunEvent]:
    """The events that `buf curl` gets from WatchRun."""
    done = subprocess.run(
        [
            *(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge"),
            *("--unix-socket", str(state_dir / "training.sock"), "-d", json.dumps(request)),
            "http://localhost/apollo.v1.TrainingService/WatchRun",
        ],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )
    text, decoder, answers, at = done.stdout, json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        answer, at = decoder.raw_decode(text, at)
        answers.append(json_format.ParseDict(answer, pb.WatchRunResponse()).event)
        at += len(text[at:]) - len(text[at:].lstrip())
    return answers


def test_it_sees_the_same_events_of_a_run_at_work_and_of_one_that_has_ended(
    caller: Any, state_dir: Path
) -> None:
    with ApolloClient(f"unix:{state_dir}/training.sock") as client:
        stream = client.train([SAMPLE], epochs=50)
        told = [next(stream), next(stream)]
        seen = watch_run(state_dir, {"runId": told[0].run_id})
        told += stream
        assert seen == told
        rest = watch_run(state_dir, {"runId": told[0].run_id, "afterSequence": "20"})
        assert rest == told[20:]

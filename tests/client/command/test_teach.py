"""What `apollo teach` tells the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving
from tests.command_line import apollo

SUCCEEDED = pb.RunEvent(finished=pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED))


@pytest.fixture
def scripted() -> Scripted:
    return Scripted([pb.RunEvent(started=pb.RunEvent.Started(steps_total=1)), SUCCEEDED])


@pytest.fixture
def address(scripted: Scripted) -> Iterator[str]:
    with serving(scripted) as address:
        yield address


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    lines = [{"prompt": f"The capital of {n} is", "answer": "Port"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def taught(scripted: Scripted, address: str, *arguments: str) -> pb.RunSpec:
    done = apollo("--address", address, "teach", *arguments)
    assert done.returncode == 0, done.stderr
    spec: pb.RunSpec = scripted.asked[-1].spec
    return spec


def test_by_default_a_tenth_may_stay_unlearned_and_nothing_may_be_lost(
    scripted: Scripted, address: str, facts: Path
) -> None:
    spec = taught(scripted, address, str(facts))
    assert len(spec.samples) == 24
    assert len(spec.probes) == 12
    assert spec.accept_if == pb.AcceptIf(max_failed=2, max_lost=0)
    assert spec.anchors.HasField("self_made")


def test_flags_change_the_lesson(scripted: Scripted, address: str, facts: Path) -> None:
    spec = taught(
        scripted, address, str(facts), "--no-chat", "--keep", "--lr", "3e-5", "--seed", "7"
    )
    assert len(spec.samples) == 12
    assert not spec.HasField("accept_if")
    assert (spec.optimizer.lr, spec.seed) == (3e-5, 7)
    limits = taught(scripted, address, str(facts), "--max-failed", "0", "--max-lost", "3").accept_if
    assert (limits.max_failed, limits.max_lost) == (0, 3)

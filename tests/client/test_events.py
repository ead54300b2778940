"""Events of a run are told apart by Python's `match`, with their types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

from apollo_client import Finished, Happened, Notice, Step, happened
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG

ROOT = Path(__file__).parents[2]
PROGRAM = """
from typing import assert_never, assert_type

from apollo_client import (
    ApolloClient, Evaluated, Finished, Notice, Probed, Queued, Started, StateSaved, Step, happened,
)

with ApolloClient() as client:
    for event in client.train([("a", "b")]):
        match happened(event):
            case Step(step=number, loss=loss):
                assert_type((number, loss), tuple[int, float])
            case Notice(message=message):
                assert_type(message, str)
            case Finished() as end:
                assert_type(end.steps_done, int)
            case Queued() | Started() | Evaluated() | StateSaved() | Probed() | None:
                pass
            case other:
                assert_never(other)
"""


def test_a_program_that_matches_events_has_full_types(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kind_of_event_is_told(connect, server) -> None:
    events = connect(server).train([("a", "b")], epochs=2)
    told = [happened(event) for event in events]
    assert None not in told
    assert [message.step for message in told if isinstance(message, Step)] == [1, 2]
    match told[-1]:
        case Finished(state=pb.RUN_STATE_SUCCEEDED, steps_done=steps):
            assert steps == 2
        case other:
            raise AssertionError(other)


def test_the_kinds_are_those_of_the_contract() -> None:
    kinds = pb.RunEvent.DESCRIPTOR.oneofs_by_name["event"].fields
    assert {kind.message_type.full_name for kind in kinds} == {
        kind.DESCRIPTOR.full_name for kind in get_args(Happened)
    }
    warning = pb.Notice(reason="SLOW", message="It is.")
    assert happened(pb.RunEvent(warning=warning)) == warning and isinstance(warning, Notice)


def test_a_kind_of_a_newer_server_is_none() -> None:
    # Field 99, a message of no bytes.
    event = pb.RunEvent.FromString(pb.RunEvent(run_id="r").SerializeToString() + b"\x9a\x06\x00")
    assert event.run_id == "r" and happened(event) is None
    assert happened(pb.WatchRunsResponse(revision=3).event) is None

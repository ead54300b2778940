"""`apollo logs`: the last events of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import OutOfRange
from apollo_grpc.statuses import abort_arguments
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving
from tests.command_line import apollo
from tests.waiting import wait_until


def test_the_last_events_are_told_with_their_times(server: str) -> None:
    with ApolloClient(server) as client:
        *_, last = client.train([("a", "b")], epochs=4)
    done = apollo("--address", server, "logs", last.run_id, "-n", "3")
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 3)
    assert all(line[10] == " " and line[23:29] == " UTC  " for line in lines)
    assert "succeeded: 4 steps" in lines[-1]
    every = apollo("--address", server, "logs", last.run_id, "--json").stdout
    sequences = [int(json.loads(line)["sequence"]) for line in every.splitlines()]
    assert sequences == list(range(1, last.sequence + 1))


def test_of_a_run_at_work_those_until_now_are_told(server: str) -> None:
    with ApolloClient(server) as client:
        run = client.create_run([("a", "b")], epochs=100_000, min_loss=0.0)
        try:
            wait_until(lambda: client.get_run(run.run_id).steps_done > 2, "the steps")
            done = apollo("--address", server, "logs", run.run_id)
        finally:
            client.cancel_run(run.run_id)
    assert (done.returncode, "step 3 " in done.stdout) == (0, True)
    assert "cancelled" not in done.stdout


class Pruned(Scripted):
    """Has the events of a run from the third on."""

    def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=pb.Run(run_id=request.run_id, last_sequence=5))

    def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> Iterator[pb.WatchRunResponse]:
        if request.after_sequence < 2:
            gone = OutOfRange("gone", reason="EVENTS_PRUNED", metadata={"first_kept": "3"})
            code, words, details = abort_arguments(gone)
            context.set_trailing_metadata(details)
            context.abort(code, words)
        for number in range(request.after_sequence + 1, 6):
            step = pb.RunEvent.Step(step=number, loss=number)
            yield pb.WatchRunResponse(
                event=pb.RunEvent(run_id=request.run_id, sequence=number, step=step)
            )


@pytest.fixture
def pruned() -> Iterator[str]:
    with serving(Pruned()) as address:
        yield address


@pytest.mark.parametrize("command", ["logs", "plot"])
def test_events_that_are_gone_are_told_and_the_rest_is_shown(pruned: str, command: str) -> None:
    done = apollo("--address", pruned, command, "0" * 32)
    assert done.returncode == 0
    assert done.stderr == "apollo: the server has no events before 3 any more\n"
    assert "step 3" in done.stdout and "step 2" not in done.stdout

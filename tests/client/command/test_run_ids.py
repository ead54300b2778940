"""Which run is meant: a whole id, the first characters of one, or the newest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving
from tests.command_line import apollo

IDS = [f"{number:032x}" for number in (0xA << 124, 0xB0 << 120, *(0xC0 + n for n in range(9)))]
FIRST, SECOND, *ALIKE = IDS


class Runs(Scripted):
    """Lists runs of these ids, three a page, and tells of one of them."""

    def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        start = int(request.page_token or 0)
        size = min(request.page_size, 3)
        token = str(start + size) if start + size < len(IDS) else ""
        runs = [pb.Run(run_id=run_id) for run_id in IDS[start : start + size]]
        return pb.ListRunsResponse(runs=runs, next_page_token=token)

    def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        self.asked.append(request)
        return pb.GetRunResponse(run=pb.Run(run_id=request.run_id))


@pytest.fixture
def address() -> Iterator[str]:
    with serving(Runs()) as address:
        yield address


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ([FIRST], FIRST),
        (["a"], FIRST),
        (["b000"], SECOND),
        ([ALIKE[-1]], ALIKE[-1]),
        (["--last"], FIRST),
    ],
)
def test_a_run_is_found_by_the_begin_of_its_id_on_any_page(
    address: str, words: list[str], meant: str
) -> None:
    done = apollo("--address", address, "run", *words, "--json")
    assert json.loads(done.stdout)["run_id"] == meant


def test_a_begin_of_several_ids_is_told_with_the_runs_that_it_may_mean(address: str) -> None:
    done = apollo("--address", address, "run", "0")
    assert (done.returncode, done.stdout) == (2, "")
    first, *candidates = done.stderr.splitlines()
    assert first == f"apollo: RUN_ID: 0 begins the ids of {len(ALIKE)} runs; give more of it:"
    assert [line.split()[0] for line in candidates[:5]] == ALIKE[:5]
    assert candidates[5].startswith(f"  and {len(ALIKE) - 5} more")


@pytest.mark.parametrize("words", [[], ["a", "--last"]])
@pytest.mark.parametrize("command", ["run", "wait", "logs", "plot", "cancel", "delete"])
def test_one_run_is_named_in_one_way(address: str, command: str, words: list[str]) -> None:
    done = apollo("--address", address, command, *words)
    assert done.returncode == 2
    assert "RUN_ID: or --last is needed, and not both" in done.stderr


def test_every_command_that_takes_a_run_takes_the_begin_of_its_id_and_the_newest(
    server: str,
) -> None:
    with ApolloClient(server) as client:
        *_, last = client.train([("a", "b")], epochs=2)
        ids = [run.run_id for run in client.list_runs(1000).runs]
    run_id = last.run_id
    short = next(
        run_id[:n]
        for n in range(1, 33)
        if sum(each.startswith(run_id[:n]) for each in ids) == 1
    )  # fmt: skip
    assert ids[0] == run_id and len(short) < len(run_id)
    for command in ("run", "wait", "logs", "plot", "cancel", "watch"):
        whole = apollo("--address", server, command, run_id, "--json")
        assert whole.returncode == 0 and run_id in whole.stdout
        for words in ([short], ["--last"]):
            assert apollo("--address", server, command, *words, "--json").stdout == whole.stdout
    assert apollo("--address", server, "delete", short).stdout == f"deleted {run_id}\n"

"""What each command tells programs: `schemas` has a JSON Schema of it, which it keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from jsonschema import Draft202012Validator

from apollo_client import ApolloClient
from apollo_client.command.app import app
from apollo_client.command.display import to_json
from apollo_client.command.doctor import Diagnosis
from apollo_grpc.v1 import checkpoint_pb2, status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving
from tests.command_line import apollo
from tests.waiting import HANG

SCHEMAS = Path(__file__).with_name("schemas")
SAMPLE = pb.Sample(text=pb.TextSample(context="The sea is", continuation=" deep."))
# Words of a command, and the schema of its lines; in braces is what `place` holds. What deletes
# comes last of its kind.
TOLD = {
    "config": "config",
    "status": "status",
    "info": "info",
    "train {facts} --evaluate --name told": "run_event",
    "watch {run}": "run_event",
    "logs {run}": "run_event",
    "wait {run}": "run",
    "run {run}": "run",
    "run {run} --samples": "run",
    "runs": "run",
    "plot {run}": "plot",
    "cancel {run}": "run",
    "checkpoint verify --live": "verify",
    "sync": "sync",
    "checkpoint sync": "sync",
    "checkpoint create told": "snapshot",
    "checkpoint list": "snapshot",
    "checkpoint undo": "restore",
    "checkpoint restore first": "restore",
    "checkpoint export {new}": "export",
    "checkpoint operations": "operation",
    "checkpoint cancel {operation}": "cancelled",
    "checkpoint delete first": "deleted",
    "datasets add {facts} --name told": "dataset",
    "datasets list": "dataset",
    "datasets delete {dataset}": "deleted",
    "--token-file {tokens} token add ci --scope read": "token",
    "--token-file {tokens} token list": "token",
    "--token-file {tokens} token remove first": "removed_token",
    "delete {run}": "deleted",
}
SCRIPTED = {
    "probes": "probe",
    "probes delete sea": "deleted_probes",
    "teach {taught}": "run_event",
}
# There is something to tell, and it is that it is not well.
NOT_WELL = {"checkpoint verify --live", "checkpoint cancel {operation}"}
# These have no end, or start vLLM, or need a model of links: tests of their own are below.
APART = {"watch", "doctor", "checkpoint adopt"}


@dataclass(frozen=True)
class Place:
    """A server with one of each thing, by the name that stands for it above."""

    address: str
    names: dict[str, str]

    def lines(self, words: str) -> list[Any]:
        """What a command tells programs; it must tell something and end well."""
        given = words.format(**self.names).split()
        done = apollo("--address", self.address, *given, "--json")
        assert done.stdout, done.stderr
        assert (done.returncode == 0) is (words not in NOT_WELL), done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def place(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    (facts := folder / "facts").write_text('{"context": "The sea is", "continuation": " deep."}')
    tokens = folder / "private" / "token"
    for name in ("first", "second"):
        apollo("--token-file", str(tokens), "token", "add", name, "--scope", "train")
    names = {"facts": str(facts), "tokens": str(tokens), "new": str(folder / "new")}
    with ApolloClient(server) as client:
        client.sync()
        client.create_snapshot("first", request_id="an-operation")
        *_, last = client.train([SAMPLE], epochs=2)
        dataset = client.create_dataset([SAMPLE], name="first")
        names |= {"run": last.run_id, "dataset": dataset.dataset_id, "operation": "an-operation"}
        yield Place(server, names)
        for each in client.list_snapshots().snapshots:
            client.delete_snapshot(each.snapshot_id)


def check(schema: str, told: list[Any]) -> None:
    found = json.loads((SCHEMAS / f"{schema}.json").read_text())
    Draft202012Validator.check_schema(found)
    for line in told:
        Draft202012Validator(found).validate(line)


@pytest.mark.parametrize("words", TOLD)
def test_what_a_command_tells_programs_is_as_its_schema_says(place: Place, words: str) -> None:
    check(TOLD[words], place.lines(words))


@pytest.mark.parametrize("words", SCRIPTED)
def test_so_is_what_a_lesson_and_its_probes_tell(words: str, tmp_path: Path) -> None:
    (taught := tmp_path / "taught").write_text('{"prompt": "The sea is", "answer": "deep"}')
    finished = pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED)
    events = [pb.RunEvent(started=pb.RunEvent.Started()), pb.RunEvent(finished=finished)]
    for event in events:
        event.event_time.seconds = 1
    with serving(Scripted(events, [pb.Probe(name="sea", sample=SAMPLE)])) as address:
        check(SCRIPTED[words], Place(address, {"taught": str(taught)}).lines(words))


@pytest.mark.parametrize(
    ("options", "schema"), [([], "update"), (["--all", "--after", "0"], "revision")]
)
def test_so_is_what_watch_tells_of_all_runs(
    server: str, options: list[str], schema: str, train_one: Callable[[], None]
) -> None:
    words = ["--address", server, "watch", *options, "--json"]
    command = [sys.executable, "-m", "apollo_client.command", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout
        told = [watch.stdout.readline()]
        train_one()
        told += [watch.stdout.readline() for _ in range(4)]
        watch.kill()
        watch.wait(HANG)
    check(schema, [json.loads(line) for line in told])
    assert any("event" in line for line in told)


@pytest.fixture
def train_one(server: str) -> Callable[[], None]:
    def train() -> None:
        with ApolloClient(server) as client:
            list(client.train([SAMPLE], epochs=2))

    return train


def test_so_is_what_an_adoption_copied() -> None:
    told = checkpoint_pb2.AdoptResult(directory="/new", files=3, bytes_written=4)
    check("adopt", [json.loads(to_json(told))])


def test_so_is_a_diagnosis() -> None:
    diagnosis = Diagnosis("/model")
    check("diagnosis", [asdict(diagnosis)])
    diagnosis.take(status_pb2.ServerStatus(attachment=status_pb2.ATTACHMENT_STATE_REFUSED))
    check("diagnosis", [asdict(diagnosis)])


def test_so_is_an_address_where_nobody_answers(tmp_path: Path) -> None:
    done = apollo("--address", f"unix:{tmp_path}/none", "config", "--json")
    assert done.returncode == 3
    check("config", [json.loads(done.stdout)])


def test_every_command_with_json_has_a_schema_here() -> None:
    words = {*TOLD, *SCRIPTED, *APART}
    heads = {line.split("token-file {tokens} ")[-1] for line in words}
    missing = [
        path
        for path in with_json(typer.main.get_command(app))
        if not any(head == path or head.startswith(f"{path} ") for head in heads)
    ]
    assert missing == []


def with_json(command: Any, path: str = "") -> Iterator[str]:
    """Every command that has `--json`, by its words."""
    if any("--json" in each.opts for each in command.params):
        yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from with_json(below, f"{path} {name}".strip())


def test_no_schema_is_left_over() -> None:
    used = {*TOLD.values(), *SCRIPTED.values(), "update", "revision", "diagnosis", "adopt"}
    assert {path.stem for path in SCHEMAS.iterdir()} == used

"""Samples of files on the server: brought, listed, learned and deleted by their id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apollo_client.command.many_samples import MAX_SAMPLES
from tests.command_line import apollo

LINE = '{"context": "a", "continuation": "b"}\n'
WRONG_ROLE = json.dumps(
    {"messages": [{"role": "user", "content": "a"}, {"role": "Assistant", "content": "b"}]}
)


@pytest.fixture
def on_server(server: str) -> Any:
    def run(*arguments: str, **options: Any) -> Any:
        return apollo("--address", server, *arguments, **options)

    return run


def test_files_are_one_dataset_that_is_learned_and_deleted(on_server: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(json.dumps({"context": name, "continuation": "b"}))
    files = [str(tmp_path / name) for name in ("one", "two")]
    told = on_server("datasets", "add", *files)
    dataset_id = told.stdout.split()[0]
    assert (told.returncode, "  one  2 samples, " in told.stdout) == (0, True)
    assert told.stdout in on_server("datasets", "list").stdout
    again = json.loads(on_server("datasets", "add", *files, "--name", "late", "--json").stdout)
    assert (again["dataset_id"], again["name"]) == (dataset_id, "one")
    assert again in map(json.loads, on_server("datasets", "list", "--json").stdout.splitlines())
    done = on_server("train", "--dataset", dataset_id, "--dry-run")
    assert done.returncode == 0
    # A dry run leaves no step in the weights.
    assert "0/2 steps" in on_server("runs", "--limit", "1").stdout
    assert on_server("datasets", "delete", dataset_id).stdout == f"deleted {dataset_id}\n"
    gone = on_server("train", "--dataset", dataset_id)
    assert (gone.returncode, "DATASET_NOT_FOUND" in gone.stderr) == (1, True)


@pytest.mark.parametrize("arguments", [[], ["facts.jsonl", "--dataset", "d"]])
def test_a_run_learns_a_file_or_a_dataset(on_server: Any, arguments: list[str]) -> None:
    done = on_server("train", *arguments)
    assert (done.returncode, "FILE: or --dataset" in done.stderr) == (2, True)


def test_a_wrong_line_is_told_and_nothing_is_kept(on_server: Any, tmp_path: Path) -> None:
    (file := tmp_path / "facts.jsonl").write_text(LINE + '{"context": "a", "continuation": ""}')
    before = on_server("datasets", "list").stdout
    done = on_server("datasets", "add", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith(f"apollo: {file}:2: continuation: is empty")
    assert on_server("datasets", "list").stdout == before


def test_a_file_of_more_than_a_run_takes_is_brought_as_a_dataset(
    on_server: Any, tmp_path: Path
) -> None:
    (file := tmp_path / "many.jsonl").write_text(LINE * MAX_SAMPLES + WRONG_ROLE)
    done = on_server("train", str(file))
    assert done.returncode == 2
    (listed,) = [
        line for line in on_server("datasets", "list").stdout.splitlines() if "many" in line
    ]
    dataset_id = listed.split()[0]
    assert f"its {MAX_SAMPLES + 1} samples are dataset {dataset_id}" in done.stderr
    assert f"{file}:{MAX_SAMPLES + 1}: messages" in done.stderr and "spec." not in done.stderr
    assert on_server("datasets", "delete", dataset_id).returncode == 0

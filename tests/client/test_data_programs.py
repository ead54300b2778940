"""The programs of examples/data, each run as a user runs it, against a training server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG

FOLDER = Path(__file__).parents[2] / "examples/data"
ASKED = ["prompt=question", "completion=answer"]


def run(server: str, program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / program), *map(str, words)]
    environment = os.environ | {"APOLLO_ADDRESS": server}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)


def told(server: str, program: str, *words: str | Path) -> list[str]:
    """The lines that it prints; it must succeed."""
    done = run(server, program, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


FILES = sorted(FOLDER.glob("*.jsonl"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_each_kind_of_file_is_learned(server: str, file: Path) -> None:
    columns = ASKED if file.stem == "questions" else []
    first, *steps, last = told(server, "jsonl_file.py", file, *columns)
    assert first.startswith("run ") and len(steps) == 10
    assert last.startswith("10 steps: loss ")


def test_the_wrong_lines_of_a_file_are_told_together(server: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n{"promt": "a"}\n')
    done = run(server, "jsonl_file.py", path)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == f"{path}:1: completion: is missing (and 1 more lines)"
    assert second.startswith(f"{path}:3: ")


def test_a_data_frame_is_learned_and_comes_back(server: str, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    lines = told(server, "data_frame.py", tmp_path / "losses.svg")
    assert lines[0].split() == ["step", "loss", "grad_norm", "learning_rate"]
    assert len(lines) == 12 and (tmp_path / "losses.svg").read_text().startswith("<svg")


def test_a_dataset_is_learned(server: str) -> None:
    pytest.importorskip("datasets")
    first, last = told(server, "hf_dataset.py")
    assert first.startswith("run ") and last.startswith("10 steps: loss ")

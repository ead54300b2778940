"""What `--to` names, and what is told where a library is not there or refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apollo_client.sinks import open_sink
from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from tests.client.sinks.run_events import RUN, events


@pytest.mark.parametrize("target", ["", "csv", "csv:", "xlsx:a", ":a", "CSV:a"])
def test_a_word_that_names_no_sink_is_refused_with_those_that_do(target: str) -> None:
    with pytest.raises(InvalidArgument, match="csv:FILE, tensorboard:DIR or wandb:PROJECT"):
        open_sink(target, RUN)


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "."])
def test_a_run_id_that_would_lead_elsewhere_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(InvalidArgument, match="run_id"):
        open_sink(f"tensorboard:{tmp_path}", run_id)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "module", "command"),
    [
        ("tensorboard:here", "tensorboardX.record_writer", "pip install apollo-grpc[sinks]"),
        ("wandb:project", "wandb", "pip install apollo-grpc[wandb]"),
    ],
)
def test_a_library_that_is_missing_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, module: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FailedPrecondition) as refused:
        open_sink(target, RUN)
    assert refused.value.reason == "SINK_LIBRARY_MISSING"
    assert command in refused.value.message
    assert list(tmp_path.iterdir()) == []


class Wandb:
    """Stands in for the library: takes what a run logs, as of a service that has some already."""

    Error = RuntimeError

    def __init__(self, starting_step: int = 0):
        self.starting_step, self.logged = starting_step, list[tuple[int, Any]]()
        self.asked: dict[str, Any] = {}
        self.Settings = SimpleNamespace

    def init(self, **asked: Any) -> Any:
        self.asked = asked
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, figures: Any, step: int) -> None:
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.logged.append((0, "finished"))


def test_wandb_is_told_each_event_once_behind_those_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb = Wandb(starting_step=6)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sink = open_sink("wandb:facts", RUN)
    assert (wandb.asked["project"], wandb.asked["id"]) == ("facts", RUN)
    assert wandb.asked["settings"].console == "off"
    assert sink.after == 5
    for event in events(4)[sink.after :]:
        sink.write(event)
    sink.close()
    assert [step for step, _ in wandb.logged] == [6, 7, 8, 0]
    assert wandb.logged[0][1]["step"] == 3 and wandb.logged[0][1]["loss"] == 1 / 3
    assert wandb.logged[2][1] == {"step": 4, "evaluated/samples": 0.75}


def test_a_refusal_of_wandb_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()

    def refuse(**asked: Any) -> Any:
        raise wandb.Error("No API key configured.")

    wandb.init = refuse  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(FailedPrecondition, match=r"No API key.*WANDB_MODE=offline"):
        open_sink("wandb:facts", RUN)

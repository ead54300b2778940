"""Lines of the server's log: what they are about, and what they leave out."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest

from apollo_grpc.interceptors import _as_domain_error
from apollo_trainer import logs

log = logging.getLogger("apollo_trainer.test")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    kept = root.level, list(root.handlers)
    yield
    root.level, root.handlers[:] = kept
    for name in logs.OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    """The lines of JSON since the last call."""
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_of_json_has_time_level_message_and_logger(lines: Any) -> None:
    logs.begin("json")
    log.warning("%d steps\nand a second line", 3)
    (line,) = lines()
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "apollo_trainer.test",
        "message": "3 steps\nand a second line",
    }


def test_a_line_says_which_run_and_operation_it_is_about(lines: Any) -> None:
    logs.begin("json")
    with logs.about(run_id="r1"):
        log.info("within")
        with logs.about(operation_id="o1"):
            log.info("deeper")
        log.info("another's", extra={"run_id": "r2"})
        thread = threading.Thread(target=copy_context().run, args=[log.info, "on a thread"])
        thread.start()
        thread.join()
    log.info("after")
    found = [(each.get("run_id"), each.get("operation_id")) for each in lines()]
    assert found == [("r1", None), ("r1", "o1"), ("r2", None), ("r1", None), (None, None)]


def test_a_line_of_text_has_the_ids_that_its_message_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.begin("text")
    with logs.about(run_id="r1"):
        log.warning("the disk is full")
        log.warning("run r1: the disk is full")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("WARNING the disk is full (run_id=r1)")
    assert second.endswith("WARNING run r1: the disk is full")


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_unexpected_error_is_told_by_its_type_and_place_and_not_by_its_text(
    form: logs.Format, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.begin(form)

    def fail(said: str) -> None:
        try:
            raise ValueError(said)
        except ValueError as error:
            raise RuntimeError(f"which was: {said}") from error

    try:
        fail(" ".join(["a", "sentence"]))
    except RuntimeError as error:
        incident = _as_domain_error(error).metadata["incident"]
    told = capsys.readouterr().err
    assert "a sentence" not in told
    assert "builtins.RuntimeError" in told and "builtins.ValueError" in told
    assert "test_logs.py" in told and "in fail" in told
    assert incident in told
    if form == "json":
        assert json.loads(told)["incident"] == incident


def test_lines_of_a_lower_level_are_left_out_and_those_of_others_at_debug_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = logging.getLogger("somebody.elses")
    for level in ("debug", "info", "warning", "error"):
        logs.begin("text", level)
        for logger in (log, others):
            for name in ("debug", "info", "warning", "error"):
                getattr(logger, name)("%s at %s", name, level)
    told = capsys.readouterr().err
    assert [told.count(f"at {level}") for level in ("debug", "info", "warning")] == [7, 6, 4]
    assert told.count("at error") == 2


def test_beginning_again_changes_the_form_and_says_nothing_twice(lines: Any) -> None:
    logs.begin("text")
    logs.begin("json")
    log.info("once")
    assert [line["message"] for line in lines()] == ["once"]


def test_standard_error_may_be_another_one_by_the_time_of_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", before := io.StringIO())
    logs.begin("text")
    log.info("before")
    before.close()
    monkeypatch.setattr(sys, "stderr", after := io.StringIO())
    log.info("after")
    assert after.getvalue().endswith("INFO after\n")

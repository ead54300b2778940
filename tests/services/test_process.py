"""The server as a process: exit statuses, a graceful stop, one server a state folder."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from apollo_trainer.checkpoints.apollo_state import load_state
from apollo_trainer.main import main
from tests.waiting import HANG


def test_sigterm_in_mid_run_saves_the_state_and_exits_with_zero(
    start_engine: Any, start_process: Any, call_at: Any, wait: Any, state_dir: Path
) -> None:
    engine, process = start_engine(), start_process("--rank", "8")
    caller = call_at(f"unix:{state_dir}/training.sock")
    wait(caller.serves, "the server")
    caller.wait_attached()
    events = []
    for answer in caller.start(epochs=100_000):
        events.append(answer.event)
        if answer.event.step.step == 3:
            process.send_signal(signal.SIGTERM)
    assert process.wait(HANG) == 0
    finished = events[-1].finished
    assert finished.failure.reason == "SERVER_STOPPED"
    (path,) = state_dir.glob("models/*/apollo_state.safetensors")
    loaded = load_state(path)
    assert loaded is not None
    assert loaded[1]["optimizer"]["step_count"] == finished.steps_done >= 3
    assert engine.calls == ["reset caches"]


def test_a_second_server_on_one_state_folder_is_refused_and_the_first_serves_on(
    start_server: Any, start_process: Any, tmp_path: Path
) -> None:
    first, second = start_server(), start_process()
    assert second.wait(HANG) == 1
    errors = (tmp_path / "server.log").read_text()
    assert "Another server already holds" in errors
    assert "Traceback" not in errors
    assert first.serves()


@pytest.mark.parametrize(
    ("arguments", "names"), [(["--rank", "0"], "rank"), (["--variant", "other"], "variant")]
)
def test_wrong_settings_exit_with_two_and_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], names: str
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    errors = capsys.readouterr().err
    assert f"apollo-training-server: {names}: " in errors
    assert "Traceback" not in errors

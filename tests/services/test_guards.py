"""What SIGHUP does: tokens are read again, or a terminal that was closed ends the server."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apollo_trainer.config import Settings
from apollo_trainer.guards import Guards


def handler_of(guards: Guards, stop: Callable[[], None]) -> Callable[[], None]:
    found: dict[int, Callable[[], None]] = {}
    loop: Any = SimpleNamespace(
        add_signal_handler=found.__setitem__, run_in_executor=lambda _, work: work()
    )
    guards.listen(loop, stop)
    return found[signal.SIGHUP]


def terminal(open_: bool) -> Any:
    """A stream that is a terminal or not, and takes what others write."""
    return SimpleNamespace(isatty=lambda: open_, write=len, flush=lambda: None)


@pytest.mark.parametrize(
    ("before", "after", "ends"),
    [(False, False, False), (True, True, False), (True, False, True)],
)
def test_a_terminal_that_was_closed_ends_the_server_and_nothing_else_does(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch, before: bool, after: bool, ends: bool
) -> None:
    stopped = list[bool]()
    guards = Guards(Settings(address="127.0.0.1:0", state_dir=state_dir))
    tokens = guards.of_address().tokens
    assert tokens
    monkeypatch.setattr(sys, "stderr", terminal(before))
    hang_up = handler_of(guards, lambda: stopped.append(True))
    monkeypatch.setattr(sys, "stderr", terminal(after))
    (state_dir / "token").write_text("another-token-of-the-user")
    hang_up()
    assert stopped == [True] * ends
    assert bool(tokens.find("another-token-of-the-user")) is not ends


def test_on_a_socket_nothing_is_read(state_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    guards = Guards(Settings(state_dir=state_dir))
    assert guards.of_address().tokens is None
    with caplog.at_level(logging.INFO):
        handler_of(guards, lambda: None)()
    assert "nothing was read again" in caplog.text
    assert not (state_dir / "token").exists()

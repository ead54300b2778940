"""How tests wait for what another thread or process does, and how long that may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# After so many seconds a wait is taken for a hang: no claim about how fast anything is, so a
# machine with much else to do does not reach it.
HANG = 120.0
_WORK_SECONDS = 0.05


def wait_until(done: Callable[[], Any], what: str, seconds: float = HANG) -> None:
    """Polls until `done`; an AssertionError names what did not come."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.005)


def slowness() -> float:
    """How many seconds a second of this thread's work takes now; 1 on an idle machine."""
    began, work = time.monotonic(), time.thread_time()
    while time.thread_time() - work < _WORK_SECONDS:
        pass
    return max(1.0, (time.monotonic() - began) / _WORK_SECONDS)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fails where what is within takes longer, on a busy machine by as much longer as work does."""
    before, began = slowness(), time.monotonic()
    yield
    took = time.monotonic() - began
    factor = max(before, slowness())
    assert took < seconds * factor, f"{took:.2f} s, of {seconds:g} s times {factor:.2f}"


def alive(pid: int) -> bool:
    """Whether a process runs, and is not one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False

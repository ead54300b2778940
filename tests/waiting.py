"""How tests wait for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 30.0


def wait_until(done: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Polls until `done`; an AssertionError names what did not come."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.005)

"""How long vLLM takes between two tokens of a request, told iteration by iteration."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, NamedTuple

# Some ten seconds of a fast engine's; whoever reads less often misses the oldest.
KEPT = 4096


class Iteration(NamedTuple):
    """One iteration of vLLM's scheduler that gave some request another token.

    Attributes:
        ended: CLOCK_MONOTONIC, in seconds, which all processes of a host share.
        gap: seconds since the token before, the mean of its requests.
    """

    ended: float
    gap: float


class TokenTimes:
    """The last iterations. Written on vLLM's event loop, read on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[Iteration] = deque(maxlen=KEPT)
        self._count = 0

    def add(self, gaps: list[float]) -> None:
        """An iteration just ended; nothing where it gave first tokens alone."""
        if not gaps:
            return
        with self._lock:
            self._kept.append(Iteration(time.monotonic(), sum(gaps) / len(gaps)))
            self._count += 1

    def since(self, count: int) -> tuple[list[Iteration], int]:
        """Those after so many, and how many there have been: what to ask with the next time."""
        with self._lock:
            new = min(self._count - count, len(self._kept))
            return list(self._kept)[len(self._kept) - new :], self._count


def listen(client: Any, times: TokenTimes) -> bool:
    """Has vLLM tell of its iterations, beside what it logs.

    Args:
        client: vLLM's AsyncLLM (vllm/v1/engine/async_llm.py), on its own loop.

    Returns whether it does: with `--disable-log-stats` it measures nothing.
    """
    manager = getattr(client, "logger_manager", None)
    if manager is None:
        return False
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    class Listener(AggregateStatLoggerBase):  # type: ignore[misc]
        """vLLM calls it on its event loop, after each batch of outputs."""

        def __init__(self) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            """Takes the times between tokens (vllm/v1/metrics/stats.py, IterationStats)."""
            if iteration_stats is not None:
                times.add(iteration_stats.inter_token_latencies_iter)

        def log_engine_initialized(self) -> None:
            """Says nothing."""

    manager.stat_loggers.append(Listener())
    return True

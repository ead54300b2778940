"""Saves the Apollo state in the background: one write at a time, the newest last.

The training thread copies the state between two steps; this thread encodes and flushes it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apollo_grpc import traces
from apollo_trainer.checkpoints.apollo_state import save_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedState:
    """A copy of the Apollo state at the end of a step.

    Attributes:
        path: the file that it replaces.
        supersedes: a file that is deleted once this one is on disk.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    description: dict[str, Any]
    optimizer_step: int
    supersedes: Path | None = None

    def write(self) -> int:
        """Writes it durably; returns the file's bytes. Raises OSError with the old file kept."""
        size = save_state(self.path, self.tensors, self.description)
        if self.supersedes:
            self.supersedes.unlink(missing_ok=True)
        return size


@dataclass(frozen=True)
class Saved:
    """The result of a save; `error` is empty where the state is on disk."""

    optimizer_step: int
    size_bytes: int = 0
    error: str = ""


Done = Callable[[Saved], None]


@dataclass
class _Job:
    state: CapturedState
    replaceable: bool
    done: list[Done]
    span: traces.Span


class StateSaver:
    """A thread that saves until `stop`; any thread may call it."""

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._busy = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="state-saver", daemon=True)
        self._thread.start()

    def save(self, state: CapturedState, done: Done) -> None:
        """Queues a save; `done` is called on the saver's thread.

        Replaces a queued save to the same file, whose `done` is called with this one's result.
        """
        # What `done` logs is about what the caller is at.
        context = copy_context()

        def told(saved: Saved) -> None:
            context.run(done, saved)

        with self._changed:
            last = self._jobs[-1] if self._jobs else None
            if last and last.replaceable and last.state.path == state.path:
                last.state = state
                last.done.append(told)
                return
            self._jobs.append(_Job(state, True, [told], _span(state)))
            self._changed.notify_all()

    def save_and_wait(self, state: CapturedState) -> Saved:
        """Saves the state; returns when it is on disk, or when that failed."""
        future: Future[Saved] = Future()
        with self._changed:
            self._jobs.append(_Job(state, False, [future.set_result], _span(state)))
            self._changed.notify_all()
        return future.result()

    @property
    def idle(self) -> bool:
        """Whether a save would begin at once."""
        return not self._jobs and not self._busy

    def flush(self) -> None:
        """Returns when all saves have ended."""
        with self._changed:
            self._changed.wait_for(lambda: self.idle)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            saved = _save(job.state)
            job.span.end(failed=bool(saved.error), bytes=saved.size_bytes)
            for done in job.done:
                try:
                    done(saved)
                except Exception:
                    log.exception("the end of a save was not told")
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopped)
            if not self._jobs:
                return None
            self._busy = True
            return self._jobs.popleft()

    def stop(self) -> None:
        """Returns when all saves have ended, and the thread with them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()


def _span(state: CapturedState) -> traces.Span:
    # None in the middle of a run, where each step may be followed by a save.
    return traces.begin("save") if state.supersedes else traces.Span()


def _save(state: CapturedState) -> Saved:
    try:
        return Saved(state.optimizer_step, state.write())
    except OSError as error:
        return Saved(state.optimizer_step, error=error.strerror or str(error))
    except Exception as error:
        log.exception("the Apollo state was not saved")
        return Saved(state.optimizer_step, error=type(error).__name__)

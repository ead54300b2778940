"""How long training waits between two steps, so that vLLM keeps its share of tokens.

Steps on vLLM's device slow its tokens down: from t0 seconds between two to t1 while a step is at
work. An iteration of vLLM's that takes a seconds beside no step and b beside one is one iteration:
a / t0 + b / t1 = 1, solved by least squares, each weighted by one over its seconds: so one counts
for the time that it took, and t0 and t1 are means, as tokens are counted by. Older iterations count
for less. Training a part d of the time, vLLM keeps 1 - d (1 - t0 / t1) of its tokens, so that a
share s allows d = (1 - s) / (1 - t0 / t1).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from apollo_trainer.training.device_part import DevicePart

# An iteration counts for a third after so long: single ones differ by more than steps cost them.
FORGET_SECONDS = 10.0
# Fewer say nothing yet.
FEW = 16
# Steps that an iteration is compared with: the sidecar tells of it a quarter second later.
STEPS = 64
# Nobody waits for tokens when none has come for so long, and for so many times the last one took.
IDLE_SECONDS, IDLE_TIMES = 0.6, 4
# The shortest wait: the sidecar tells of an iteration when its tokens are out, which may be the
# next one's time, and many iterations beside no step make little of that. It is also the wait while
# it is not known how fast tokens come without training.
LOOK_SECONDS = 0.1
# Times beside steps and without must differ in share for the two to be told apart.
LEAST_DETERMINANT = 0.01
# Where steps cost nothing vLLM is left alone at times, to see how fast it is then.
LEAST_DUTY, MOST_DUTY = 0.02, 0.98
MOST_SECONDS = 60.0
# Whoever cancels a run waits no longer than that.
ASK_SECONDS = 0.05


def sharing_of(environment: Mapping[str, str], part: int | None = None) -> str:
    """How this process shares a GPU with vLLM, in a sentence, by its environment variables.

    Args:
        part: percent of its multiprocessors that steps run on while vLLM decodes; None for all.

    CUDA_MPS_*: NVIDIA, "Multi-Process Service". vLLM must have been given the same daemon.
    """
    if not environment.get("CUDA_MPS_PIPE_DIRECTORY"):
        return "Training and vLLM take turns on the GPU."
    most = environment.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")
    beside = f", {part} % while vLLM decodes" if part else ""
    return f"Training runs beside vLLM by MPS, with {most} % of the GPU's threads{beside}."


class Pace:
    """Measures what steps cost vLLM, and says how long to wait after one.

    Args:
        share: of the tokens that vLLM would make undisturbed; 0 asks for nothing.
        clock: CLOCK_MONOTONIC, as the sidecar's.

    Attributes:
        part: of the GPU, for what runs beside a vLLM that decodes; None where it is not divided.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic):
        self._share, self._clock = share, clock
        self.part: DevicePart | None = None
        self._lock = threading.Lock()
        # When each began and ended; the one at work ends some day.
        self._steps: deque[tuple[float, float]] = deque(maxlen=STEPS)
        # Over iterations of a seconds beside no step and b beside one, each divided by a + b: of
        # a + b, a a, a b, b b, a, b.
        self._sums = [0.0] * 6
        self._summed_at = -math.inf
        self._idle_from = self._turn = self._served_from = -math.inf
        self._owed = 0.0  # seconds that steps did not wait yet

    def tokens(self, iterations: Iterable[tuple[float, float]]) -> None:
        """What the sidecar told: when each iteration ended, and the seconds it took. Any thread.

        One that waited for a run does not count.
        """
        with self._lock:
            for ended, seconds in iterations:
                if seconds <= 0 or ended - seconds < self._served_from:
                    continue
                self._idle_from = ended + max(IDLE_SECONDS, IDLE_TIMES * seconds)
                self._add(ended, seconds, self._busy(ended - seconds, ended))

    def _add(self, ended: float, seconds: float, busy: float) -> None:
        kept = math.exp(min(0.0, self._summed_at - ended) / FORGET_SECONDS)
        self._summed_at = max(self._summed_at, ended)
        free = seconds - busy
        added = (seconds, free * free, free * busy, busy * busy, free, busy)
        self._sums = [kept * s + a / seconds for s, a in zip(self._sums, added, strict=True)]

    def _busy(self, begin: float, end: float) -> float:
        """Seconds of a span in which a step was at work."""
        return sum(max(0.0, min(e, end) - max(b, begin)) for b, e in self._steps)

    @property
    def serving(self) -> bool:
        """Whether somebody waits for tokens. Any thread."""
        with self._lock:
            return self._clock() <= self._idle_from

    def place(self) -> AbstractContextManager[None]:
        """Has passes run on the part while somebody waits for tokens. Training thread."""
        return self.part.running() if self.part and self.serving else nullcontext()

    @contextmanager
    def paused_step(self) -> Iterator[float]:
        """The same for a step while vLLM waits for the whole run: its turn is at once."""
        try:
            yield 0.0
        finally:
            with self._lock:
                self._served_from = self._clock()

    @contextmanager
    def step(self, require_going: Callable[[], None]) -> Iterator[float]:
        """Waits for the turn of a step, which is taken within it; gives the seconds waited.

        Args:
            require_going: called meanwhile; what it raises ends the wait.

        Training thread.
        """
        began = self._clock()
        while (left := self._turn - self._clock()) > 0:
            require_going()
            time.sleep(min(left, ASK_SECONDS))
        self.step_begins()
        try:
            yield self._clock() - began
        finally:
            self._turn = self._clock() + self.step_ended()

    def step_begins(self) -> None:
        """A step begins. Training thread."""
        with self._lock:
            self._steps.append((self._clock(), math.inf))

    def step_ended(self) -> float:
        """Seconds to wait after the step that began last, which has just ended. Training thread."""
        now = self._clock()
        with self._lock:
            began, _ = self._steps.pop()
            self._steps.append((began, now))
            # Before the step: within it vLLM may have waited for the write.
            if not self._share or began > self._idle_from:
                self._owed = 0.0
                return 0.0
            slowed = self._slowed()
        if slowed is None:
            return LOOK_SECONDS
        duty = (1 - self._share) / max(slowed, 1 - self._share)
        duty = min(max(duty, LEAST_DUTY), MOST_DUTY)
        owed = self._owed + max(0.0, (now - began) * (1 / duty - 1))
        self._owed = owed if owed < LOOK_SECONDS else 0.0
        return 0.0 if self._owed else min(MOST_SECONDS, owed)

    def _slowed(self) -> float | None:
        """1 - t0 / t1: the part of its tokens that vLLM loses beside a step; None if unknown."""
        count, aa, ab, bb, alone, beside = self._sums
        determinant = aa * bb - ab * ab
        if count < FEW or determinant <= LEAST_DETERMINANT * aa * bb:
            return None
        rate, slow = alone * bb - beside * ab, beside * aa - alone * ab
        return 1 - slow / rate if rate > 0 else None

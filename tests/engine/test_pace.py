"""The pace of training: an engine whose tokens are slowed down by steps, by a clock of its own."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_trainer.engine.pace import IDLE_SECONDS, MOST_SECONDS, Pace, sharing_of

TOLD_SECONDS = 0.25


class Machine:
    """Tokens every `alone` seconds, or `beside` while a step is at work; told as the sidecar does.

    Attributes:
        late: seconds after an iteration's end at which it is told to have ended.
        uneven: iterations take a quarter less, but for one of so many, which makes up for it.
        share: of the tokens that would have been made undisturbed, since `begin`.
    """

    def __init__(
        self, share: float, alone: float, beside: float, late: float = 0.0, uneven: int = 0
    ):
        self.now, self._alone, self._beside, self._late = 100.0, alone, beside, late
        # Of iterations, one on average.
        self._lengths = 50 * [*(max(1, uneven) - 1) * [0.75], 1 + (max(1, uneven) - 1) / 4]
        Random(1).shuffle(self._lengths)
        self._iterations = 0
        self.pace = Pace(share, lambda: self.now)
        self._progress = 0.0
        self._last, self._told_at = self.now, self.now
        self._untold: list[tuple[float, float]] = []
        self.begin()

    def begin(self) -> None:
        self.began, self.tokens, self.steps = self.now, 0, 0

    @property
    def share(self) -> float:
        return self.tokens * self._alone / (self.now - self.began)

    @property
    def _length(self) -> float:
        return self._lengths[self._iterations % len(self._lengths)]

    def run(self, seconds: float, between: float) -> None:
        """Lets time pass, with a token every so many seconds."""
        while seconds > 0:
            part = min(seconds, TOLD_SECONDS)
            self._run(part, between)
            seconds -= part

    def _run(self, seconds: float, between: float) -> None:
        end = self.now + seconds
        while (rest := (self._length - self._progress) * between) <= end - self.now:
            self.now, self._progress = self.now + rest, 0.0
            self._iterations += 1
            self._untold.append((self.now + self._late, self.now - self._last))
            self._last = self.now
            self.tokens += 1
        self._progress += (end - self.now) / between
        self.now = end
        if self.now - self._told_at >= TOLD_SECONDS:
            self.pace.tokens(self._untold)
            self._told_at, self._untold = self.now, []

    def train_on(self, seconds: float) -> None:
        """Steps of so many seconds until their pace is found; then `begin`, and 100 more."""
        self.run(1.0, self._alone)
        for _ in range(200):
            self.train(seconds)
        self.begin()
        for _ in range(100):
            self.train(seconds)

    def train(self, seconds: float) -> float:
        """One step, and the wait after it, which is returned."""
        self.pace.step_begins()
        self.run(seconds, self._beside)
        waits = self.pace.step_ended()
        self.run(waits, self._alone)
        self.steps += 1
        return waits


@settings(max_examples=6)
@given(
    share=st.floats(0.5, 0.98),
    alone=st.floats(0.01, 0.2),
    slower=st.floats(1.0, 4.0),
    step=st.floats(0.02, 1.0),
)
def test_vllm_keeps_its_share(share: float, alone: float, slower: float, step: float) -> None:
    machine = Machine(share, alone, alone * slower)
    machine.run(1.0, alone)
    while machine.now < 115:
        machine.train(step)
    machine.begin()
    while machine.now < 155:
        machine.train(step)
    assert machine.share >= share - 0.03


def test_training_takes_what_the_share_leaves() -> None:
    """Tokens half as fast, a tenth of them to give: a step works a fifth of the time."""
    machine = Machine(0.9, 0.004, 0.008)
    machine.train_on(0.06)
    assert machine.steps * 0.06 / (machine.now - machine.began) == pytest.approx(0.2, rel=0.1)


def test_iterations_that_stand_out_count_for_no_more_than_their_time() -> None:
    """One of five takes nearly three times what another does, beside steps and without."""
    machine = Machine(0.92, 0.004, 0.0052, uneven=5)
    machine.train_on(0.06)
    assert machine.share == pytest.approx(0.92, abs=0.02)


def test_iterations_that_are_told_late_hide_nothing() -> None:
    """By two of them: vLLM computes the next ones while it hands out tokens."""
    machine = Machine(0.9, 0.004, 0.0046, late=0.009)
    machine.train_on(0.06)
    assert machine.share >= 0.885


def test_what_costs_vllm_less_than_its_share_hardly_waits() -> None:
    """It is looked at times how fast tokens come without training."""
    machine = Machine(0.9, 0.004, 0.0042)
    machine.run(1.0, 0.004)
    waits = [machine.train(0.06) for _ in range(400)]
    assert 0 < sum(waits[20:]) <= 0.03 * 0.06 * 380


def test_a_run_that_paused_vllm_says_nothing_of_its_pace() -> None:
    machine = Machine(0.9, 0.004, 0.008)
    for _ in range(50):
        machine.train(0.06)
    with machine.pace.paused_step():
        machine.now += 20
    machine.run(0.5, 0.004)
    waits = [machine.train(0.06) for _ in range(20)]
    assert min(waits) > 0.15


def test_nobody_waits_beside_an_idle_engine() -> None:
    machine = Machine(0.9, 0.004, 0.008)
    for _ in range(50):
        machine.train(0.06)
    machine.now += IDLE_SECONDS + TOLD_SECONDS
    machine.pace.step_begins()
    machine.now += 0.06
    assert machine.pace.step_ended() == 0


def test_tokens_that_wait_for_a_long_write_are_no_idle_engine() -> None:
    machine = Machine(0.9, 0.06, 0.06 * 2)
    for _ in range(40):
        machine.train(0.6)
    machine.pace.step_begins()
    machine.run(0.5, machine._beside)
    machine.now += 2 * IDLE_SECONDS
    assert machine.pace.step_ended() > 1


def test_it_says_whether_somebody_waits_for_tokens() -> None:
    machine = Machine(0.9, alone=0.01, beside=0.02)
    assert not machine.pace.serving
    machine.run(2 * TOLD_SECONDS, 0.01)
    assert machine.pace.serving
    machine.now += 2 * IDLE_SECONDS
    assert not machine.pace.serving


def test_a_share_of_nothing_asks_for_nothing() -> None:
    machine = Machine(0, 0.004, 0.1)
    assert [machine.train(0.06) for _ in range(50)] == [0.0] * 50


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 10)), max_size=50), st.floats(0, 1))
def test_a_wait_is_bounded_whatever_is_told(told: list[tuple[float, float]], share: float) -> None:
    pace = Pace(share, lambda: 1e3)
    pace.step_begins()
    pace.tokens(told)
    assert 0 <= pace.step_ended() <= MOST_SECONDS


def test_how_a_gpu_is_shared_is_said() -> None:
    assert "turns" in sharing_of({})
    daemon = {"CUDA_MPS_PIPE_DIRECTORY": "/run/user/0/mps"}
    assert "100 %" in sharing_of(daemon)
    assert "threads, 25 % while vLLM decodes." in sharing_of(daemon, 25)
    assert "by MPS, with 25 %" in sharing_of(daemon | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25"})

"""A pause ends by itself, is renewed by its holder, and belongs to no one else."""

from __future__ import annotations

import threading
import time

import pytest

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_sidecar import leases
from apollo_sidecar.leases import MAX_LEASE_SECONDS, PauseLeases
from tests.waiting import HANG, wait_until


class Recorded:
    """Leases over an engine that only remembers what it was told."""

    def __init__(self):
        self.told: list[object] = []
        self.resumed = threading.Event()
        self.fails: dict[str, Exception] = {}
        self.late: list[tuple[int, bool]] = []
        self.leases = PauseLeases(self._pause, self._resume, self._tell)

    def _pause(self, mode):
        self.told.append(mode)
        if "pause" in self.fails:
            raise self.fails["pause"]

    def _resume(self, changed, reset_caches):
        self.told.append(changed)
        if "resume" in self.fails:
            raise self.fails["resume"]
        self.resumed.set()

    def _tell(self, updates, reset_caches):
        self.late.append((updates, reset_caches))


@pytest.fixture
def engine():
    return Recorded()


def refused(call, *args):
    with pytest.raises(FailedPrecondition) as error:
        call(*args)
    return error.value.reason


def test_a_lease_pauses_once_and_resumes_once(engine):
    left = engine.leases.acquire("a", 30, "keep")
    assert 29 < left <= 30
    assert engine.leases.active
    engine.leases.release("a", False)
    assert not engine.leases.active
    assert engine.told == ["keep", False]


@pytest.mark.parametrize("changed", [True, False])
def test_the_resume_is_told_whether_the_weights_changed(engine, changed):
    engine.leases.acquire("a", 30, "wait")
    engine.leases.release("a", changed)
    assert engine.told == ["wait", changed]


def test_a_lease_that_runs_out_resumes_and_counts_as_changed(engine):
    engine.leases.acquire("a", 0.05, "keep")
    assert engine.resumed.wait(HANG)
    assert refused(engine.leases.acquire, "a", 30, "keep") == "LEASE_ENDED"
    assert engine.told == ["keep", True]
    assert not engine.leases.active


def test_a_renewed_lease_outlives_its_first_end_and_pauses_no_second_time(engine):
    engine.leases.acquire("a", 0.2, "keep")
    assert engine.leases.acquire("a", 30, "keep") > 29
    assert not engine.resumed.wait(0.5)
    engine.leases.release("a", False)
    assert engine.told == ["keep", False]


def test_a_renewal_may_also_shorten(engine):
    engine.leases.acquire("a", 30, "keep")
    engine.leases.acquire("a", 0.05, "keep")
    assert engine.resumed.wait(HANG)


def test_another_holder_is_refused_while_the_lease_lasts(engine):
    engine.leases.acquire("a", 30, "keep")
    assert refused(engine.leases.acquire, "b", 30, "keep") == "LEASE_HELD"
    assert refused(engine.leases.release, "b", True) == "LEASE_UNKNOWN"
    assert engine.leases.active
    engine.leases.release("a", False)
    engine.leases.acquire("b", 30, "keep")
    engine.leases.release("b", False)
    assert engine.told == ["keep", False, "keep", False]


def test_ending_a_lease_again_does_nothing(engine):
    engine.leases.acquire("a", 30, "keep")
    engine.leases.release("a", True)
    engine.leases.release("a", True)
    assert engine.told == ["keep", True]


def test_a_lease_that_has_ended_cannot_be_taken_up_again(engine):
    engine.leases.acquire("a", 30, "keep")
    engine.leases.release("a", False)
    assert refused(engine.leases.acquire, "a", 30, "keep") == "LEASE_ENDED"


@pytest.mark.parametrize("lease_id", ["a", ""])
def test_a_lease_that_never_was_cannot_be_ended(engine, lease_id):
    engine.leases.acquire("b", 30, "keep")
    assert refused(engine.leases.release, lease_id, True) == "LEASE_UNKNOWN"
    engine.leases.release("b", False)


def test_no_lease_is_longer_than_the_limit(engine):
    assert engine.leases.acquire("a", 10_000, "keep") <= MAX_LEASE_SECONDS
    engine.leases.release("a", False)


def test_a_pause_that_fails_lets_the_engine_go_on_and_holds_no_lease(engine):
    engine.fails["pause"] = TimeoutError()
    with pytest.raises(TimeoutError):
        engine.leases.acquire("a", 30, "wait")
    assert engine.told == ["wait", False]
    assert not engine.leases.active
    engine.fails.clear()
    engine.leases.acquire("a", 30, "wait")
    engine.leases.release("a", False)


def test_a_resume_that_fails_says_so_and_leaves_room_for_the_next_lease(engine):
    engine.fails["resume"] = Unavailable("blocks are held", reason="CACHE_NOT_RESET")
    engine.leases.acquire("a", 30, "keep")
    with pytest.raises(Unavailable):
        engine.leases.release("a", True)
    assert not engine.leases.active
    engine.fails.clear()
    engine.leases.acquire("b", 30, "keep")
    engine.leases.release("b", False)
    assert engine.told == ["keep", True, "keep", False]


def test_of_many_holders_at_once_exactly_one_gets_the_lease(engine):
    got: list[str] = []

    def take(name):
        try:
            engine.leases.acquire(name, 30, "keep")
        except FailedPrecondition:
            return
        got.append(name)

    takers = [threading.Thread(target=take, args=[str(i)]) for i in range(8)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(HANG)
    assert len(got) == 1
    assert engine.told == ["keep"]
    engine.leases.release(got[0], False)


def test_a_lease_that_was_ended_in_time_does_not_run_out(engine):
    engine.leases.acquire("a", 0.1, "keep")
    engine.leases.release("a", False)
    time.sleep(0.3)
    assert engine.told == ["keep", False]


@pytest.fixture
def at_once(monkeypatch):
    """What failed is tried again every hundredth of a second."""
    monkeypatch.setattr(leases, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(leases, "MAX_RETRY_SECONDS", 0.01)


BUSY = Unavailable("vLLM did not answer within 120 s.", reason="ENGINE_SLOW")


@pytest.mark.parametrize("how", ["released", "run out", "never begun"])
def test_a_resume_that_fails_is_tried_again_until_it_works(engine, at_once, how):
    engine.fails["resume"] = BUSY
    if how == "released":
        engine.leases.acquire("a", 30, "keep")
        with pytest.raises(Unavailable):
            engine.leases.release("a", 2)
    elif how == "run out":
        engine.leases.acquire("a", 0.01, "keep")
    else:
        engine.fails["pause"] = TimeoutError()
        with pytest.raises(Unavailable):
            engine.leases.acquire("a", 30, "keep")
    wait_until(lambda: engine.told[2:5] == [0, 0, 0], "three more attempts")
    assert not engine.resumed.is_set()
    engine.fails.clear()
    assert engine.resumed.wait(HANG)
    attempts = len(engine.told)
    engine.leases.acquire("b", 30, "keep")
    engine.leases.release("b", 0)
    assert engine.told[attempts:] == ["keep", 0], "once it worked, nothing is tried any more"


def test_an_engine_that_ends_is_not_asked_for_ever(engine, at_once):
    engine.fails["resume"] = Unavailable("vLLM is stopping.", reason="ENGINE_STOPPING")
    engine.leases.acquire("a", 30, "keep")
    with pytest.raises(Unavailable):
        engine.leases.release("a", 0)
    wait_until(lambda: engine.told == ["keep", 0, 0], "one more attempt")
    engine.leases._retry.join(HANG)
    assert engine.told == ["keep", 0, 0]


def test_no_lease_that_ended_can_be_taken_up_again_however_many_ended_since(engine):
    for name in "abcd":
        engine.leases.acquire(name, 30, "keep")
        engine.leases.release(name, 0)
    before = list(engine.told)
    for name in "abcd":
        assert refused(engine.leases.acquire, name, 30, "keep") == "LEASE_ENDED"
        engine.leases.release(name, 1)
    assert (engine.told, engine.late) == (before, []), "each had said what it wrote"


def test_what_was_written_after_a_lease_ran_out_is_told_once(engine):
    engine.leases.acquire("a", 0.02, "keep")
    assert engine.resumed.wait(HANG)
    engine.leases.acquire("b", 30, "keep")
    engine.leases.release("a", 3, True)
    engine.leases.release("a", 3, True)
    assert engine.late == [(3, True)]
    assert engine.told == ["keep", 1, "keep"], "it ends no pause of another's"
    engine.leases.release("b", 0)

"""Each mode holds vLLM where it says, counts updates, and drops caches when the policy says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine.coherence import Coherence, coherence_of
from apollo_trainer.weights.sidecar import Sidecar

LIVE, PAUSE_STEP, PAUSE_RUN = (
    pb.COHERENCE_MODE_LIVE,
    pb.COHERENCE_MODE_PAUSE_STEP,
    pb.COHERENCE_MODE_PAUSE_RUN,
)
AT_END, EACH_STEP, KEEP = (
    pb.CACHE_POLICY_RESET_AT_END,
    pb.CACHE_POLICY_RESET_EACH_STEP,
    pb.CACHE_POLICY_KEEP,
)
P, C, R = "pause keep", "reset caches", "resume"
# Of a run of two steps.
CALLS = {
    (LIVE, AT_END): [C],
    (LIVE, EACH_STEP): [C, C],
    (LIVE, KEEP): [],
    (PAUSE_STEP, AT_END): [P, R, P, R, C],
    (PAUSE_STEP, EACH_STEP): [P, C, R, P, C, R],
    (PAUSE_STEP, KEEP): [P, R, P, R],
    (PAUSE_RUN, AT_END): [P, C, R],
    (PAUSE_RUN, EACH_STEP): [P, C, R],
    (PAUSE_RUN, KEEP): [P, R],
}


class Attached:
    """As much of an attachment as coherence needs."""

    alive = True

    def __init__(self, epoch: str):
        self.epoch = epoch

    @property
    def gone(self) -> bool:
        return not self.alive

    def require_live(self) -> None:
        """Nobody else changes the weights."""

    require_as_left = remember = require_live

    def synchronize(self) -> None:
        """Nothing is on its way to a GPU."""


@pytest.fixture
def engine(start_engine: Callable[..., Any]) -> Any:
    return start_engine()


@pytest.fixture
def make(engine: Any, sidecar_address: str) -> Callable[..., Coherence]:
    def made(mode: Any = 0, policy: Any = 0, seconds: float = 10.0) -> Coherence:
        attachment: Any = Attached(engine.engine.epoch)
        asked = pb.Coherence(mode=mode, cache_policy=policy)
        return coherence_of(asked, Sidecar(sidecar_address), attachment, seconds)

    return made


def run(coherence: Coherence, steps: int) -> None:
    coherence.begin()
    for _ in range(steps):
        coherence.before_write()
        coherence.after_step()
    coherence.end()


@pytest.mark.parametrize(("mode", "policy"), CALLS)
def test_a_mode_asks_vllm_for_just_what_it_says(engine: Any, make: Any, mode: Any, policy: Any):
    coherence = make(mode, policy)
    run(coherence, steps=2)
    assert engine.calls == CALLS[mode, policy]
    assert coherence.weight_version == engine.engine.weight_version == 2
    assert not engine.engine.leases.active


def test_unset_is_no_pause_and_a_reset_at_the_end(engine: Any, make: Any) -> None:
    run(make(), steps=2)
    assert engine.calls == CALLS[LIVE, AT_END]


@pytest.mark.parametrize("mode", [LIVE, PAUSE_STEP, PAUSE_RUN])
def test_a_run_that_wrote_nothing_changes_nothing(engine: Any, make: Any, mode: Any) -> None:
    run(make(mode), steps=0)
    assert C not in engine.calls
    assert engine.engine.weight_version == 0


@pytest.mark.parametrize("mode", [LIVE, PAUSE_STEP, PAUSE_RUN])
def test_a_step_that_failed_halfway_still_drops_caches(engine: Any, make: Any, mode: Any) -> None:
    coherence = make(mode)
    coherence.begin()
    coherence.before_write()
    coherence.end()
    assert C in engine.calls
    assert not engine.engine.leases.active


def test_pause_step_holds_vllm_only_from_the_first_write_on(engine: Any, make: Any) -> None:
    coherence = make(PAUSE_STEP)
    coherence.begin()
    assert not engine.engine.leases.active
    for _ in range(3):
        coherence.before_write()
        assert engine.engine.leases.active
    coherence.after_step()
    assert not engine.engine.leases.active
    assert engine.calls == [P, R]
    assert 0 < coherence.step_held_seconds == coherence.held_seconds


@pytest.mark.parametrize("mode", [LIVE, PAUSE_STEP, PAUSE_RUN])
def test_nothing_may_be_written_to_an_engine_that_is_gone(make: Any, mode: Any) -> None:
    coherence = make(mode)
    coherence.begin()
    coherence._attachment.alive = False
    with pytest.raises(Unavailable) as refused:
        coherence.before_write()
    assert refused.value.reason == "ENGINE_LOST"


def test_nothing_may_be_written_after_vllm_went_on(engine: Any, make: Any) -> None:
    coherence = make(PAUSE_RUN, seconds=0.09)
    coherence.begin()
    leases = engine.engine.leases
    leases.release(leases._lease_id, 1)
    with pytest.raises(FailedPrecondition) as refused:
        for _ in range(10_000_000):
            coherence.before_write()
    assert refused.value.reason == "PAUSE_LOST"

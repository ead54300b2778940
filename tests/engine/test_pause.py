"""vLLM's pause: renewed while it is held, and over when its holder is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_trainer.engine import pause as pause_module
from apollo_trainer.engine.pause import EnginePause
from apollo_trainer.weights.sidecar import Sidecar


class Attached:
    """As much of an attachment as a pause needs."""

    gone = False

    def __init__(self, epoch: str):
        self.epoch = epoch

    def synchronize(self) -> None:
        """Nothing is on its way to a GPU."""


@pytest.fixture
def engine(start_engine: Callable[..., Any]) -> Any:
    return start_engine()


def hold(engine: Any, address: str, seconds: float = 10.0, epoch: str = "") -> EnginePause:
    attachment: Any = Attached(epoch or engine.engine.epoch)
    return EnginePause(Sidecar(address), attachment, seconds)


def test_a_pause_is_held_until_its_end(engine: Any, sidecar_address: str) -> None:
    pause = hold(engine, sidecar_address)
    assert engine.engine.leases.active
    assert pause.end(weights_changed=True) == 1
    assert not engine.engine.leases.active
    assert 0 < pause.held_seconds < 10
    assert engine.calls == ["pause keep", "reset caches", "resume"]


def test_weights_that_did_not_change_keep_version_and_caches(
    engine: Any, sidecar_address: str
) -> None:
    assert hold(engine, sidecar_address).end(weights_changed=False) == 0
    assert engine.calls == ["pause keep", "resume"]


def test_a_pause_longer_than_its_lease_is_renewed(engine: Any, sidecar_address: str) -> None:
    pause = hold(engine, sidecar_address, seconds=0.3)
    time.sleep(0.9)
    assert engine.engine.leases.active
    assert pause.lost is None
    pause.end(weights_changed=False)
    assert engine.calls == ["pause keep", "resume"]


def test_a_holder_that_stops_renewing_cannot_freeze_vllm(
    engine: Any, sidecar_address: str, wait: Any
) -> None:
    pause = hold(engine, sidecar_address, seconds=0.1)
    pause._ended.set()
    wait(lambda: not engine.engine.leases.active, "the end of the lease")
    assert engine.calls == ["pause keep", "reset caches", "resume"]


def test_a_pause_that_ended_early_is_noticed(engine: Any, sidecar_address: str, wait: Any) -> None:
    pause = hold(engine, sidecar_address, seconds=0.09)
    engine.engine.leases.release(pause._lease_id, True)
    wait(lambda: pause.lost, "the notice")
    assert isinstance(pause.lost, FailedPrecondition)
    pause.end(weights_changed=True)


def test_right_before_a_write_it_is_asked_whether_vllm_still_waits(
    engine: Any, sidecar_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = hold(engine, sidecar_address)
    engine.call(engine.client.resume_generation())
    pause.confirm()
    assert pause.lost is None, "just now it did"
    monkeypatch.setattr(pause_module, "CONFIRMED_SECONDS", 0.0)
    pause.confirm()
    assert pause.lost and pause.lost.reason == "LEASE_ENDED"
    assert "Somebody else let vLLM go on" in pause.lost.message
    assert pause.end(weights_changed=True, updates=2) == 3, "it counted one when it ended"


def test_another_engine_is_never_paused(engine: Any, sidecar_address: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        hold(engine, sidecar_address, epoch="of an older engine")
    assert caught.value.reason == "EPOCH_CHANGED"
    assert engine.calls == []


def test_the_end_of_a_pause_on_a_dead_engine_says_that_nobody_answers(
    engine: Any, sidecar_address: str
) -> None:
    pause = hold(engine, sidecar_address)
    engine.stop()
    with pytest.raises(Unavailable):
        pause.end(weights_changed=True)
    with pytest.raises(Unavailable):
        hold(engine, sidecar_address)


def test_the_lease_of_a_server_that_died_is_waited_for(engine: Any, sidecar_address: str) -> None:
    dead = hold(engine, sidecar_address, seconds=0.3)
    dead._ended.set()
    pause = hold(engine, sidecar_address)
    assert pause.lost is None
    # What the dead one may have written is an update, of the next one's time nothing.
    assert pause.end(weights_changed=False) == 1


def test_a_second_holder_is_refused_where_the_first_does_not_end(
    engine: Any, sidecar_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause_module, "LONGEST_LEASE_SECONDS", 0.05)
    other = hold(engine, sidecar_address)
    with pytest.raises(FailedPrecondition, match="another lease") as refused:
        hold(engine, sidecar_address)
    assert refused.value.reason == "LEASE_HELD"
    other.end(weights_changed=False)

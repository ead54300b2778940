"""What Prometheus is told of events, statuses and calls, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from apollo_grpc.times import duration
from apollo_grpc.v1 import reason_pb2, status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import StatusBoard
from apollo_trainer.watching import Ring
from apollo_trainer.watching.metrics import PHASES, Metrics

RUN = "0123456789abcdef"
# Values of each label come from the code or the contract, never from a caller.
LABELS = {"phase", "state", "reason", "method", "code", "le"}


class Shown:
    """A board whose metrics are shown."""

    def __init__(self) -> None:
        self.board, self.metrics = StatusBoard("1.2.3", "no engine yet"), Metrics()
        self.ring = Ring(self.board)
        self.snapshot_bytes = 0
        self.metrics.show(self.board, self.ring, lambda: self.snapshot_bytes)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"apollo_{name}", labels)

    def publish(self, **kind: object) -> None:
        self.board.publish(pb.RunEvent(run_id=RUN, **kind))  # type: ignore[arg-type]

    def samples(self) -> Iterator[tuple[str, dict[str, str]]]:
        text = generate_latest(self.metrics.registry).decode()
        for family in text_string_to_metric_families(text):
            yield from ((sample.name, sample.labels) for sample in family.samples)


@pytest.fixture
async def shown() -> Shown:
    return Shown()


def a_step(number: int = 1, **fields: object) -> pb.RunEvent.Step:
    times = {f"{phase}_time": duration(place + 0.5) for place, phase in enumerate(PHASES)}
    return pb.RunEvent.Step(step=number, loss=2.5, tokens=7, grad_norm=3.5, **times, **fields)  # type: ignore[arg-type]


def ended(
    state: pb.RunState.ValueType, reason: str = "", paused: float = 0
) -> pb.RunEvent.Finished:
    failure = pb.Notice(reason=reason) if reason else None
    return pb.RunEvent.Finished(state=state, failure=failure, pause_time=duration(paused))


async def test_steps_are_counted_with_their_tokens_and_seconds(shown: Shown) -> None:
    shown.publish(step=a_step())
    shown.publish(step=a_step(2, optimizer_step=2))
    assert shown.value("steps_total") == 2
    assert shown.value("tokens_total") == 14
    assert shown.value("last_loss_nats") == 2.5
    assert shown.value("last_gradient_norm") == 3.5
    seconds = [shown.value("step_seconds_total", phase=phase) for phase in PHASES]
    assert seconds == [1.0, 3.0, 5.0, 7.0, 9.0]


async def test_a_dry_run_has_no_steps(shown: Shown) -> None:
    shown.publish(step=a_step(dry_run=True))
    assert shown.value("steps_total") == 0
    assert shown.value("step_seconds_total", phase="forward") == 0


async def test_runs_are_counted_from_zero_on_and_failures_by_reason(shown: Shown) -> None:
    states = {"succeeded", "failed", "cancelled", "rejected"}
    assert {shown.value("runs_total", state=state) for state in states} == {0}
    shown.publish(finished=ended(pb.RUN_STATE_SUCCEEDED, paused=1.5))
    shown.publish(finished=ended(pb.RUN_STATE_FAILED, "GUARD_MAX_LOSS", paused=2))
    assert shown.value("runs_total", state="failed") == 1
    assert shown.value("runs_total", state="succeeded") == 1
    assert shown.value("run_failures_total", reason="GUARD_MAX_LOSS") == 1
    assert shown.value("paused_seconds_total") == 3.5


async def test_a_reason_that_the_contract_does_not_have_makes_no_label(shown: Shown) -> None:
    for number in range(50):
        shown.publish(finished=ended(pb.RUN_STATE_FAILED, f"MADE_UP_{number}"))
    assert shown.value("run_failures_total", reason="OTHER") == 50
    known = [name.removeprefix("REASON_") for name in reason_pb2.Reason.DESCRIPTOR.values_by_name]
    for reason in known:
        shown.publish(finished=ended(pb.RUN_STATE_FAILED, reason))
    reasons = {labels["reason"] for name, labels in shown.samples() if "failures" in name}
    assert reasons == {*known, "OTHER"}


async def test_the_status_is_as_it_is_when_it_is_asked_for(shown: Shown) -> None:
    assert shown.value("attached") == 0
    shown.board.update(
        attachment=status_pb2.ATTACHMENT_STATE_ATTACHED,
        queue_length=3,
        active_run_id=RUN,
        weight_version=12,
        optimizer_step=9,
        state_size_bytes=1000,
    )
    shown.snapshot_bytes = 77
    found = ("attached", "queued_runs", "active_runs", "weight_version", "optimizer_step")
    assert [shown.value(name) for name in found] == [1, 3, 1, 12, 9]
    assert shown.value("optimizer_state_bytes") == 1000
    assert shown.value("snapshot_bytes") == 77


async def test_updates_are_unsynced_since_the_last_sync_of_this_engine(shown: Shown) -> None:
    shown.board.update(engine_epoch="one", weight_version=5)
    assert shown.value("unsynced_updates") == 5
    shown.metrics.synced(0.25, 1000, "one", 4)
    assert shown.value("unsynced_updates") == 1
    assert shown.value("sync_bytes_total") == 1000
    assert shown.value("sync_seconds_count") == 1
    # Another engine has loaded what was synced, and counts from 0.
    shown.board.update(engine_epoch="two", weight_version=6)
    assert shown.value("unsynced_updates") == 6


async def test_watchers_and_what_slow_ones_lost(shown: Shown) -> None:
    watcher = shown.ring.subscribe()
    for number in range(5000):
        shown.board.publish(pb.RunEvent(sequence=number))
    shown.ring._look()
    while watcher.take():
        pass
    assert shown.value("watchers") == 1
    assert shown.value("dropped_updates_total") == watcher.lost > 0
    shown.ring.unsubscribe()
    assert shown.value("watchers") == 0


async def test_names_and_labels_are_of_the_house_and_tell_of_no_run(shown: Shown) -> None:
    shown.publish(step=a_step())
    shown.publish(finished=ended(pb.RUN_STATE_FAILED, "DEADLINE"))
    shown.board.update(active_run_id=RUN)
    shown.metrics.called("/apollo.v1.StatusService/GetStatus", "OK", 0.01)
    shown.metrics.committed(0.001)
    found = list(shown.samples())
    assert {name for name, _ in found if not name.startswith("apollo_")} == set()
    assert {label for _, labels in found for label in labels} <= LABELS
    assert RUN not in str(found)


async def test_publishing_takes_the_training_thread_less_than_a_third_of_a_millisecond(
    shown: Shown,
) -> None:
    events, count = [pb.RunEvent(run_id=RUN, step=a_step(n)) for n in range(100)], 20
    began = time.thread_time()
    for _ in range(count):
        for event in events:
            shown.board.publish(event)
    spent = (time.thread_time() - began) / (count * len(events))
    print(f"{1e6 * spent:.0f} us a publish")
    assert spent < 0.0003

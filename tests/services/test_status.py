"""StatusService, health and reflection over a real channel."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import apollo_trainer.services.status as status_module
from apollo_grpc.errors import InvalidArgument, ResourceExhausted
from apollo_grpc.v1 import status_pb2 as pb
from apollo_grpc.v1.training_pb2 import RunEvent
from apollo_trainer.engine.status_board import KEPT_EVENTS, StatusBoard
from apollo_trainer.main import SERVICES
from apollo_trainer.watching.ring import Ring
from tests.waiting import HANG


def updates_of_a_run(watch: Any) -> list[Any]:
    """Updates until the first `finished`."""
    got = []
    for update in watch:
        got.append(update)
        if update.event.HasField("finished"):
            return got
    raise AssertionError("the stream ended")


def test_a_watcher_gets_the_status_and_then_every_step(caller: Any) -> None:
    watch = caller.watch()
    assert next(watch).status.optimizer_loaded
    # Longer than the time between two statuses.
    sent = caller.train(epochs=60)
    got = updates_of_a_run(watch)
    assert [u.event for u in got if u.HasField("event")] == sent
    assert sum(u.dropped for u in got) == 0
    assert any(u.status.active_run_id == sent[0].run_id for u in got)
    watch.cancel()


def test_a_watcher_of_another_run_gets_no_events(caller: Any) -> None:
    watch = caller.watch(run_id="another")
    next(watch)
    caller.train()
    for update in watch:
        assert not update.HasField("event")
        if update.status.optimizer_step and not update.status.active_run_id:
            break
    watch.cancel()


def test_a_silent_stream_is_kept_alive(caller: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "HEARTBEAT_SECONDS", 0.05)
    watch = caller.watch()
    assert next(watch).HasField("status")
    beats = [next(watch), next(watch)]
    assert all(update.heartbeat.time.seconds > 0 for update in beats)
    watch.cancel()


def test_a_held_back_status_and_events_of_others_are_silence_too(
    caller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "HEARTBEAT_SECONDS", 0.2)
    watch = caller.watch(run_id="another", min_interval=Duration(seconds=600))
    assert next(watch).HasField("status")
    run = caller.start(epochs=2000)
    next(run)
    assert next(watch).HasField("heartbeat")
    assert next(watch).HasField("heartbeat")
    watch.cancel()


def test_min_interval_holds_statuses_back_but_no_events(caller: Any) -> None:
    watch = caller.watch(min_interval=Duration(seconds=20))
    assert next(watch).HasField("status")
    sent = caller.train(epochs=8)
    assert [u.event for u in updates_of_a_run(watch)] == sent
    watch.cancel()


def test_a_negative_interval_is_refused(caller: Any, error_of: Any) -> None:
    error = error_of(caller.watch(min_interval=Duration(seconds=-1)))
    assert isinstance(error, InvalidArgument)
    assert [v.field for v in error.violations] == ["min_interval"]


def test_an_interval_of_centuries_is_an_interval(caller: Any) -> None:
    watch = caller.watch(min_interval=Duration(seconds=315_576_000_000))
    assert next(watch).HasField("status")
    watch.cancel()


async def test_what_a_watcher_lost_is_told_with_its_next_message() -> None:
    board = StatusBoard("1.2.3", "no engine yet")
    ring = Ring(board)
    answers = status_module._paced(ring.subscribe(), "", 0.0)
    assert pb.WatchStatusResponse.FromString(await anext(answers)).HasField("status")
    for number in range(KEPT_EVENTS + 3):
        board.publish(RunEvent(run_id="r", sequence=number))
    told = [pb.WatchStatusResponse.FromString(await anext(answers)) for _ in range(KEPT_EVENTS)]
    assert [update.dropped for update in told] == [3] + [0] * (KEPT_EVENTS - 1)
    assert [update.event.sequence for update in told] == list(range(3, KEPT_EVENTS + 3))


def test_streams_are_limited_and_a_closed_one_makes_room(
    start_server: Any, error_of: Any, wait: Any
) -> None:
    caller = start_server(max_watchers=2)
    streams = [caller.watch() for _ in range(2)]
    for stream in streams:
        next(stream)
    error = error_of(caller.watch())
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "TOO_MANY_WATCHERS"
    assert error.metadata == {"limit": "2"}
    streams[0].cancel()

    def opens() -> bool:
        again = caller.watch()
        try:
            return bool(next(again).HasField("status"))
        except Exception:
            return False
        finally:
            again.cancel()

    wait(opens, "room for a stream")
    streams[1].cancel()


def test_a_stopping_server_ends_its_watchers(
    state_dir: Any, start_process: Any, call_at: Any, wait: Any
) -> None:
    process, caller = start_process(), call_at(f"unix:{state_dir}/training.sock")
    wait(caller.serves, "the server")
    updates = caller.watch()
    next(updates)
    process.send_signal(signal.SIGTERM)
    # A stream that was cut off would raise.
    assert all(update.HasField("status") for update in updates)
    assert process.wait(HANG) == 0


def test_every_service_is_healthy(start_server: Any) -> None:
    caller = start_server()
    for name in ("", *SERVICES):
        answer = caller.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=HANG)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services(start_server: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(start_server().channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=HANG)
    listed = {service.name for service in answer.list_services_response.service}
    assert listed >= {*SERVICES, "grpc.health.v1.Health"}

"""Limits on what is open: each kind has its own, and each host its share."""

from __future__ import annotations

import gc
import threading
from contextlib import ExitStack
from typing import Any

import pytest

import apollo_trainer.services.streams as streams_module
from apollo_client import ApolloClient
from apollo_client.aio import AsyncApolloClient
from apollo_grpc.errors import Quota, ResourceExhausted
from apollo_grpc.v1 import checkpoint_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.services.streams import RETRY_SECONDS, StreamLimit
from apollo_trainer.services.training import TrainingService
from tests.waiting import HANG


def test_the_callers_of_one_host_leave_room_for_others() -> None:
    limit = StreamLimit(4, share=0.5, what="watchers")
    with ExitStack() as held:
        for port in (5000, 5001):
            held.enter_context(limit.one(f"ipv4:10.0.0.1:{port}"))
        with pytest.raises(ResourceExhausted) as refused, limit.one("ipv4:10.0.0.1:5002"):
            pass
        assert refused.value.reason == "TOO_MANY_WATCHERS"
        assert refused.value.metadata == {"limit": "2"}
        assert refused.value.quota == Quota("watchers", "at most 2 from your host")
        assert refused.value.retry_seconds == RETRY_SECONDS
        held.enter_context(limit.one("ipv6:[::1]:6000"))
        held.enter_context(limit.one("unix:"))
        with pytest.raises(ResourceExhausted, match="4 watchers are open, "), limit.one("unix:"):
            pass
    # All have left: a host has its share again.
    with limit.one("ipv4:10.0.0.1:5003"), limit.one("ipv4:10.0.0.1:5004"):
        pass


def test_callers_on_the_unix_socket_may_have_all() -> None:
    limit = StreamLimit(3, share=0.5)
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(limit.one("unix:"))


@pytest.fixture
def full(start_engine: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A caller of a server that has room for one stream of each kind."""
    monkeypatch.setattr(streams_module, "RETRY_SECONDS", 0.05)
    start_engine()
    caller = start_server(max_streams=1, max_watchers=1)
    caller.wait_attached()
    return caller


def test_watchers_and_readers_keep_neither_training_nor_a_sync_out(
    full: Any, error_of: Any
) -> None:
    watch = full.watch()
    waiting = full.start(epochs=100_000)
    run_id = next(waiting).event.run_id
    request = pb.WatchRunRequest(run_id=run_id)
    reader = full.training.WatchRun(request, timeout=HANG)
    assert next(watch).HasField("status") and next(reader).event.HasField("queued")
    for refused, reason in (
        (full.watch(), "TOO_MANY_WATCHERS"),
        (full.training.WatchRun(request, timeout=HANG), "TOO_MANY_STREAMS"),
    ):
        error = error_of(refused)
        assert (error.reason, error.retry_seconds) == (reason, 0.05)
        assert error.quota == Quota(reason.removeprefix("TOO_MANY_").lower(), "at most 1")
    full.cancel(run_id)
    assert list(waiting)[-1].event.HasField("finished")
    assert full.train()[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    *_, synced = full.checkpoints.Sync(checkpoint_pb2.SyncRequest(), timeout=HANG)
    assert synced.HasField("result")
    for stream in (watch, reader):
        stream.cancel()


def test_calls_of_all_kinds_together_are_limited(start_server: Any, error_of: Any) -> None:
    caller = start_server(max_calls=1)
    watch = caller.watch()
    next(watch)
    error = error_of(caller.status)
    assert (error.reason, error.metadata) == ("TOO_MANY_CALLS", {"limit": "1"})
    watch.cancel()


@pytest.mark.parametrize("call", ["train", "watch", "sync"])
def test_a_client_waits_for_room(full: Any, call: str) -> None:
    held = full.watch() if call == "watch" else full.start(epochs=100_000)
    first = next(held)
    threading.Timer(0.2, held.cancel).start()
    with ApolloClient(full.address) as client:
        if call == "train":
            answer: Any = next(client.train([("The sea is", " deep.")])).HasField("queued")
        elif call == "watch":
            answer = next(client.watch()).HasField("status")
        else:
            full.cancel(first.event.run_id)
            answer = client.sync()
    assert answer


def test_a_client_without_patience_is_told_at_once(full: Any) -> None:
    watch = full.watch()
    next(watch)
    client = ApolloClient(full.address, retry_seconds=0)
    with client, pytest.raises(ResourceExhausted) as refused:
        next(client.watch())
    assert refused.value.reason == "TOO_MANY_WATCHERS"
    watch.cancel()


async def test_an_asyncio_client_waits_for_room(full: Any) -> None:
    held = full.watch()
    next(held)
    threading.Timer(0.2, held.cancel).start()
    async with AsyncApolloClient(full.address) as client:
        assert (await anext(client.watch())).HasField("status")


def test_one_message_of_samples_is_read_and_checked_at_a_time(
    caller: Any, monkeypatch: pytest.MonkeyPatch, wait: Any
) -> None:
    submit, may_go = TrainingService._submit, threading.Event()
    now, most = [0], [0]

    def slowly(service: TrainingService, request: pb.TrainRequest) -> str:
        now[0] += 1
        most[0] = max(most[0], now[0])
        assert may_go.wait(HANG)
        now[0] -= 1
        return submit(service, request)

    monkeypatch.setattr(TrainingService, "_submit", slowly)
    calls = [caller.start(epochs=number) for number in (1, 2, 3)]
    wait(lambda: now[0] == 1, "the first call")
    # All others are answered meanwhile.
    for _ in range(5):
        assert caller.status().optimizer_loaded
    assert most[0] == 1
    may_go.set()
    assert len({next(call).event.run_id for call in calls}) == 3
    assert most[0] == 1
    for call in calls:
        assert list(call)[-1].event.HasField("finished")


def test_what_a_run_was_sent_with_is_not_kept_for_its_stream(caller: Any) -> None:
    stream = caller.start(epochs=100_000)
    run_id = next(stream).event.run_id
    assert next(stream).event.HasField("started")
    # Client and server are one process here.
    assert not [each for each in gc.get_objects() if type(each) is pb.TrainRequest]
    caller.cancel(run_id)
    assert list(stream)[-1].event.HasField("finished")

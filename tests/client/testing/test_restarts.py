"""A fake server that is killed, stopped and started: what its readers see."""

from __future__ import annotations

import grpc
import pytest

from apollo_client import ApolloClient, AsyncApolloClient
from apollo_client.testing import FakeServer
from apollo_grpc.errors import Unavailable
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub

SAMPLES = [("The sea is", " deep.")]
ENDLESS = 100_000


@pytest.mark.parametrize(("killed", "reason"), [(True, "INTERRUPTED"), (False, "SERVER_STOPPED")])
def test_readers_go_on_without_a_gap_or_a_repeat(
    killed: bool, reason: str, server: FakeServer, client: ApolloClient
) -> None:
    events = []
    for event in client.train(SAMPLES, epochs=ENDLESS):
        events.append(event)
        if event.step.step == 3:
            server.restart(killed=killed)
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert event.finished.failure.reason == reason
    assert event.finished.steps_done == max(e.step.step for e in events)
    assert list(client.watch_run(event.run_id)) == events


async def test_so_do_those_of_asyncio(server: FakeServer) -> None:
    numbers = []
    async with AsyncApolloClient(server.address) as client:
        async for event in client.train(SAMPLES, epochs=ENDLESS):
            numbers.append(event.sequence)
            if event.step.step == 3:
                server.stop()
                server.start()
    assert numbers == list(range(1, event.sequence + 1))
    assert event.finished.failure.reason == "INTERRUPTED"


def test_readers_of_all_runs_go_on_too(server: FakeServer, client: ApolloClient) -> None:
    with client.watch_runs(0) as stream:
        first = client.create_run(SAMPLES, epochs=2)
        told = [next(stream)]
        while not told[-1].event.HasField("finished"):
            told.append(next(stream))
        server.restart()
        second = client.create_run(SAMPLES)
        told.append(next(stream))
        while not told[-1].event.HasField("finished"):
            told.append(next(stream))
    revisions = [each.revision for each in told]
    assert revisions == sorted(set(revisions))
    events = [each.event for each in told if each.HasField("event")]
    runs = [first.run_id, second.run_id]
    assert events == [event for run_id in runs for event in client.watch_run(run_id)]


def test_what_waits_is_kept_and_has_its_turn(server: FakeServer, client: ApolloClient) -> None:
    running = client.create_run(SAMPLES, epochs=ENDLESS)
    waiting = client.create_run(SAMPLES, request_id="mine")
    for event in client.watch_run(running.run_id):
        if event.HasField("started"):
            break
    server.restart()
    assert client.create_run(SAMPLES, request_id="mine").run_id == waiting.run_id
    *_, last = client.watch_run(waiting.run_id)
    assert last.finished.state == pb.RUN_STATE_SUCCEEDED


def test_a_server_that_is_away_is_not_there_and_comes_back(server: FakeServer) -> None:
    with ApolloClient(server.address, retry_seconds=0) as client:
        *_, before = client.train(SAMPLES)
        server.stop()
        server.stop()
        with pytest.raises(Unavailable):
            client.status()
    server.start()
    with ApolloClient(server.address) as client:
        *_, after = client.train(SAMPLES)
    assert after.finished.weight_version == before.finished.weight_version + 1


def test_an_operation_is_cut_off_and_begins_anew(server: FakeServer, client: ApolloClient) -> None:
    running = client.create_run(SAMPLES, epochs=ENDLESS)
    with Endpoint(server.address).channel() as channel:
        call = CheckpointServiceStub(channel).Sync(cp.SyncRequest(request_id="mine"))
        operation_id = next(call).operation_id
        server.restart()
        with pytest.raises(grpc.RpcError):
            list(call)
    assert client.operation(operation_id).failure.reason == "OPERATION_INTERRUPTED"
    assert client.get_run(running.run_id).failure.reason == "INTERRUPTED"
    client.sync(request_id="mine")
    assert client.operation(operation_id).state == cp.OPERATION_STATE_SUCCEEDED


def test_a_run_that_was_to_be_accepted_is_taken_back(
    server: FakeServer, client: ApolloClient
) -> None:
    probes = [{"prompt": "The sea is", "expected": " deep."}]
    for event in client.train(SAMPLES, epochs=ENDLESS, probes=probes, accept_if=True):
        if event.step.step == 2:
            server.restart()
    assert (event.finished.failure.reason, event.finished.steps_done) == ("INTERRUPTED", 0)
    assert client.status().optimizer_step == 0

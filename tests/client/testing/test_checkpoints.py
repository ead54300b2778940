"""Sync, snapshots and the ways back on a fake server, by the client."""

from __future__ import annotations

import pytest

from apollo_client import ApolloClient
from apollo_grpc.errors import AlreadyExists, FailedPrecondition
from apollo_grpc.v1 import checkpoint_pb2 as cp

SAMPLES = [("The sea is", " deep.")]


def test_a_sync_is_of_the_live_weights(client: ApolloClient) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        client.verify()
    assert refused.value.reason == "NEVER_SYNCED"
    list(client.train(SAMPLES, epochs=2))
    told: list[cp.Operation.Progress] = []
    result = client.sync(told.append)
    assert (result.weight_version, result.method) == (2, cp.SYNC_METHOD_EXCHANGE)
    assert told and told[-1].bytes_done <= told[-1].bytes_total
    assert client.sync().method == cp.SYNC_METHOD_UNCHANGED
    assert list(client.verify(full=True).differences) == []


def test_the_ways_back(client: ApolloClient) -> None:
    list(client.train(SAMPLES))
    client.create_snapshot("good")
    list(client.train(SAMPLES, epochs=3))
    assert client.undo(2).optimizer_step == 2
    restored = client.restore("good")
    assert (restored.optimizer_step, restored.weight_version) == (1, 6)
    with pytest.raises(AlreadyExists):
        client.create_snapshot("good")
    client.delete_snapshot("good")
    assert list(client.list_snapshots().snapshots) == []

"""Operations by the clients: whoever has an id finds, watches and cancels."""

from __future__ import annotations

import uuid

import pytest

from apollo_client import AsyncApolloClient
from apollo_grpc.errors import Aborted, InvalidArgument, NotFound
from apollo_grpc.v1 import checkpoint_pb2 as pb


def test_an_operation_is_found_by_either_id_and_listed(connect, server):
    client, request_id, progress = connect(server), uuid.uuid4().hex, []
    made = client.call("create_snapshot", "found", progress.append, request_id=request_id)
    found = client.call("operation", request_id=request_id)
    assert found.snapshot == made
    assert progress[-1].bytes_done == progress[-1].bytes_total > 0
    assert client.call("operation", found.operation_id) == found
    assert client.call("operations", 1, states=["SUCCEEDED"]).operations[0] == found
    assert client.call("cancel_operation", found.operation_id) == "TOO_LATE"
    client.call("delete_snapshot", "found")
    newest = client.call("operations", 1)
    assert newest.operations[0].kind == pb.OPERATION_KIND_DELETE_SNAPSHOT
    assert client.call("operations", 1, newest.next_page_token).operations[0] == found
    with pytest.raises(NotFound):
        client.call("operation", request_id)
    with pytest.raises(InvalidArgument, match="waiting, running, succeeded"):
        client.call("operations", states=["ended"])


@pytest.mark.parametrize("call", ["sync", "create_snapshot", "export"])
def test_another_weight_version_is_told(connect, server, tmp_path, call):
    arguments = [tmp_path / "new"] if call == "export" else []
    with pytest.raises(Aborted):
        connect(server).call(call, *arguments, expected_weight_version=2**40)


async def test_an_operation_is_watched_to_its_end(server):
    async with AsyncApolloClient(server) as client:
        synced = await client.sync(request_id="watched")
        seen = [each.operation async for each in client.watch_operation(request_id="watched")]
    assert seen[-1].sync == synced

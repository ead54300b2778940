"""Calls that come again are known by a digest: what is kept of them does not grow with them."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import Future
from typing import Any

import pytest

from apollo_grpc.errors import AlreadyExists
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_trainer.services.repeated import RepeatedCalls


def test_what_is_kept_of_many_large_calls_is_small() -> None:
    repeated = RepeatedCalls()
    tracemalloc.start()
    try:
        for number in range(40):
            asked = cp.CreateSnapshotRequest(request_id=str(number), name="x" * 2**20)
            repeated.begin(asked, Future[Any])
        del asked
        assert tracemalloc.get_traced_memory()[0] < 2**19
    finally:
        tracemalloc.stop()


def test_the_same_call_attaches_and_another_one_is_refused() -> None:
    repeated = RepeatedCalls()
    first = repeated.begin(cp.CreateSnapshotRequest(request_id="a", name="one"), Future[Any])
    again = cp.CreateSnapshotRequest(request_id="a", name="one")
    assert repeated.begin(again, Future[Any]) is first
    with pytest.raises(AlreadyExists):
        repeated.begin(cp.CreateSnapshotRequest(request_id="a", name="two"), Future[Any])

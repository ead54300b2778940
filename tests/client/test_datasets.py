"""Both clients bring datasets as they come, and name what is wrong as its writer does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient, AsyncApolloClient
from apollo_client.placing import Placed
from apollo_client.uploads import MESSAGE_BYTES, Upload
from apollo_grpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG

TALK = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 1},
        {"role": "assistant", "content": "c", "weight": 1},
    ]
}


def pairs(count: int, word: str = "word") -> Iterator[tuple[str, str]]:
    return ((f"{word} {number}", " deep") for number in range(count))


def losses(events: list[pb.RunEvent]) -> list[float]:
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    return [event.step.loss for event in events if event.HasField("step")]


def test_a_dataset_is_brought_named_listed_and_deleted(connect: Any, server: str) -> None:
    client = connect(server)
    made = client.call("create_dataset", pairs(3), name="three")
    assert (made.name, made.samples) == ("three", 3)
    assert client.call("dataset", made.dataset_id) == made
    assert made in client.call("datasets", 1000).datasets
    named = client.train(dataset_id=made.dataset_id, dry_run=True)
    assert losses(named) == losses(client.train(list(pairs(3)), dry_run=True))
    assert client.call("validate", dataset_id=made.dataset_id).steps_total == 3
    assert client.call("create_run", dataset_id=made.dataset_id, dry_run=True).run_id
    while True:
        try:
            client.call("delete_dataset", made.dataset_id)
            break
        except FailedPrecondition as error:
            assert error.reason == "DATASET_IN_USE"
    with pytest.raises(NotFound):
        client.call("dataset", made.dataset_id)


def test_samples_of_a_coroutine_are_brought(server: str) -> None:
    async def later() -> AsyncIterator[tuple[str, str]]:
        for pair in pairs(3, "later"):
            await asyncio.sleep(0)
            yield pair

    async def bring() -> Any:
        async with AsyncApolloClient(server) as client:
            return await client.create_dataset(later())

    made = asyncio.run(bring())
    with ApolloClient(server) as client:
        assert client.create_dataset(pairs(3, "later")) == made


def test_many_samples_are_sent_as_they_come(connect: Any, server: str) -> None:
    taken = list[int]()

    def large() -> Iterator[tuple[str, str]]:
        for number in range(200):
            taken.append(number)
            yield "a" * (MESSAGE_BYTES // 2 - 20), f"{number:03d}"

    messages = Upload("large").messages(large())
    assert len(next(messages).samples) == len(taken) <= 3
    del messages
    made = connect(server).call("create_dataset", large())
    assert (made.samples, made.size_bytes) >= (200, 99 * MESSAGE_BYTES)
    connect(server).call("delete_dataset", made.dataset_id)


def test_more_than_a_request_holds_is_told_with_what_to_do(connect: Any, server: str) -> None:
    large = [("a" * 2**20, "b")] * 70
    with pytest.raises(InvalidArgument, match=r"\[62\] they fit: .*'create_dataset' brings all"):
        connect(server).train(large)


def test_a_wrong_sample_is_named_by_its_line_or_its_item(connect: Any, server: str) -> None:
    client = connect(server)
    empty = pb.Sample(text=pb.TextSample(context="a"))
    for samples, field in (
        ([TALK, *pairs(3), empty], "samples[4].text.continuation"),
        ([Placed(pb.Sample(), "f:1"), Placed(empty, "f:7")], "f:1"),
        ([*pairs(3), ("a", "b", "c")], "samples[3]"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            client.call("create_dataset", samples)
        assert refused.value.violations[0].field == field
    for samples in (b"text", {"context": "a"}, 7):
        with pytest.raises(InvalidArgument, match="is no list of samples, nor a file"):
            client.call("create_dataset", samples)
    with pytest.raises(InvalidArgument) as refused:
        client.call("create_dataset", [])
    assert refused.value.violations[0].field == "samples"


def test_a_server_that_refuses_ends_the_upload_of_what_has_no_end(
    connect: Any, server: str
) -> None:
    def endless() -> Iterator[tuple[str, str]]:
        yield "a", ""
        while True:
            yield "a" * 100_000, "b"

    with pytest.raises(InvalidArgument) as refused:
        connect(server).call("create_dataset", endless())
    assert refused.value.violations[0].field == "samples[0].text.continuation"


class Broken(Exception):
    """Of whoever makes the samples."""


def test_what_makes_the_samples_may_fail_in_its_own_thread(connect: Any, server: str) -> None:
    client, threads = connect(server), set[threading.Thread]()
    before = client.call("datasets", 1000)

    def broken() -> Iterator[tuple[str, str]]:
        for pair in pairs(20_000):
            threads.add(threading.current_thread())
            yield pair
        raise Broken

    with pytest.raises(Broken):
        client.call("create_dataset", broken())
    assert threads == {threading.current_thread()}
    assert client.call("datasets", 1000) == before


def test_a_server_that_is_not_there_is_told(connect: Any, state_dir: Path) -> None:
    with pytest.raises(Unavailable) as refused:
        connect(f"unix:{state_dir}/none.sock").call("create_dataset", pairs(20_000))
    assert refused.value.reason == "SERVER_UNREACHABLE"


def test_a_client_that_is_closed_meanwhile_says_so(server: str) -> None:
    client = ApolloClient(server)

    def stuck() -> Iterator[tuple[str, str]]:
        yield from pairs(20_000)
        closing.start()
        closing.join(HANG)
        yield from pairs(100_000)

    closing = threading.Thread(target=client.close)
    with pytest.raises(FailedPrecondition) as refused:
        client.create_dataset(stuck())
    assert refused.value.reason == "CLIENT_CLOSED"


def test_an_upload_that_is_cancelled_ends_as_its_task(server: str) -> None:
    async def bring() -> None:
        async def stuck() -> AsyncIterator[tuple[str, str]]:
            for pair in pairs(20_000):
                yield pair
            begun.set()
            await asyncio.Event().wait()

        begun = asyncio.Event()
        async with AsyncApolloClient(server) as client:
            task = asyncio.create_task(client.create_dataset(stuck()))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(bring())

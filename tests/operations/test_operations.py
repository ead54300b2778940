"""Operations without a model: what is kept of them, how they are followed, and any life of them."""

from __future__ import annotations

import asyncio
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from apollo_grpc.errors import AlreadyExists, Cancelled, FailedPrecondition, ResourceExhausted
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_trainer.checkpoints.directory import Progress
from apollo_trainer.engine import StatusBoard
from apollo_trainer.operations import Asked, Job, Operation, Operations, operations
from tests.books import Books
from tests.waiting import HANG

NAMES = {
    number: name.removeprefix("OPERATION_STATE_") for name, number in pb.OperationState.items()
}
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")


class Desk:
    """Operations on books; their jobs are taken and ended by hand.

    Attributes:
        jobs: those that were queued, by the content of their calls.
    """

    def __init__(self, books: Books):
        self.board, owner = StatusBoard("test", ""), SimpleNamespace(session=lambda: None)
        self.operations = Operations(owner, self.board, books.ledger, books.writer)  # type: ignore[arg-type]
        self.jobs: dict[str, Job[pb.Snapshot]] = {}

    async def begin(self, request_id: str, content: str) -> Operation:
        """A snapshot's call; its name is the content."""
        request = pb.CreateSnapshotRequest(request_id=request_id, name=content)

        def start(tell: Progress) -> Job[pb.Snapshot]:
            self.jobs[content] = Job(tell)
            return self.jobs[content]

        kind = pb.OPERATION_KIND_CREATE_SNAPSHOT
        asked = Asked(kind, request, start, lambda found: pb.Operation(snapshot=found))
        async with asyncio.timeout(HANG):
            return await self.operations.begin(asked)


async def ended(operation: Operation) -> pb.Operation:
    """As it is once it has ended."""
    async with asyncio.timeout(HANG):
        *_, last = [seen async for seen in operation.follow()]
    return last


@pytest.fixture
def books(open_books: Any) -> Books:
    opened: Books = open_books()
    return opened


async def test_what_is_kept_of_many_large_calls_is_small(books: Books) -> None:
    desk = Desk(books)
    tracemalloc.start()
    try:
        for number in range(40):
            operation = await desk.begin(str(number), "x" * 2**20)
            (job,) = desk.jobs.values()
            desk.jobs.clear()
            job.set_result(pb.Snapshot(name="made"))
            assert (await ended(operation)).snapshot.name == "made"
        del job, operation
        assert tracemalloc.get_traced_memory()[0] < 2**19
    finally:
        tracemalloc.stop()


async def test_no_more_wait_than_are_taken(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MAX_LIVE", 2)
    desk = Desk(books)
    first, _ = [await desk.begin(name, name) for name in ("a", "b")]
    with pytest.raises(ResourceExhausted):
        await desk.begin("c", "c")
    assert await desk.begin("a", "a") is first
    desk.jobs["a"].set_exception(Cancelled(""))
    await ended(first)
    await desk.begin("c", "c")


async def test_progress_is_told_in_intervals_and_an_end_by_the_next_of_them(books: Books) -> None:
    desk = Desk(books)
    operation = await desk.begin("a", "a")
    job, seen = desk.jobs["a"], []
    job.set_running_or_notify_cancel()
    async with asyncio.timeout(HANG):
        async for each in operation.follow(interval=0.05):
            seen.append((NAMES[each.state], each.progress.bytes_done))
            if each.state != pb.OPERATION_STATE_RUNNING:
                continue
            # A thousand between two that are told.
            for number in range(1000):
                job.progress(1000 * len(seen) + number, 9999, "a")
            if len(seen) == 5:
                job.set_result(pb.Snapshot())
    told = [done for state, done in seen if state == "RUNNING" and done]
    assert all(done % 1000 == 999 for done in told) and len(told) >= 3
    assert seen[-1] == ("SUCCEEDED", 0)
    assert len(seen) < 12


async def test_the_one_at_work_is_on_the_board(books: Books) -> None:
    desk = Desk(books)
    first, second = [await desk.begin(name, name) for name in ("a", "b")]
    assert desk.board.snapshot().active_operation_id == ""
    for name, operation in (("b", second), ("a", first)):
        desk.jobs[name].set_running_or_notify_cancel()
        assert desk.board.snapshot().active_operation_id == operation.row.operation_id
    desk.jobs["a"].set_result(pb.Snapshot())
    await ended(first)
    assert desk.board.snapshot().active_operation_id == second.row.operation_id
    desk.jobs["b"].set_exception(OSError(28, "No space left on device"))
    assert (await ended(second)).failure.reason == "DIRECTORY_NOT_WRITABLE"
    assert desk.board.snapshot().active_operation_id == ""


async def test_a_mistake_of_the_servers_is_told_without_its_text(books: Books) -> None:
    desk = Desk(books)
    operation = await desk.begin("", "a")
    desk.jobs["a"].set_exception(RuntimeError("a path"))
    failure = (await ended(operation)).failure
    assert failure.reason == "INTERNAL"
    assert "a path" not in failure.message and operation.row.operation_id in failure.message


class OperationMachine(RuleBasedStateMachine):
    """Whatever is done in whatever order, killed or not: what is read is as a dictionary is."""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._folder = tempfile.TemporaryDirectory(prefix="apollo-")
        self._books = Books(Path(self._folder.name))
        self._desk = Desk(self._books)
        # By request id: the operation's id, its content, and its state.
        self._model: dict[str, list[str]] = {}
        self._live: dict[str, Operation] = {}

    @rule(request_id=st.sampled_from("abc"), content=st.sampled_from("xy"))
    def begin(self, request_id: str, content: str) -> None:
        known = self._model.get(request_id)
        call = self._desk.begin(request_id, f"{request_id} {content}")
        if known and known[1] != content:
            with pytest.raises(AlreadyExists) as taken:
                self._runner.run(call)
            assert taken.value.metadata == {"operation_id": known[0]}
            return
        operation = self._runner.run(call)
        if known:
            assert operation.row.operation_id == known[0]
        if not known or known[2] in ("FAILED", "CANCELLED"):
            self._model[request_id] = [operation.row.operation_id, content, "WAITING"]
            self._live[request_id] = operation
        elif request_id in self._live:
            assert operation is self._live[request_id]

    def _some(self, data: st.DataObject) -> tuple[str, Job[pb.Snapshot]]:
        request_id = data.draw(st.sampled_from(sorted(self._live)))
        return request_id, self._desk.jobs[f"{request_id} {self._model[request_id][1]}"]

    @precondition(lambda self: self._live)
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        request_id, job = self._some(data)
        if not job.running():
            assert job.set_running_or_notify_cancel()
            self._model[request_id][2] = "RUNNING"

    @precondition(lambda self: self._live)
    @rule(data=st.data(), well=st.booleans())
    def end(self, data: st.DataObject, well: bool) -> None:
        request_id, job = self._some(data)
        if well:
            job.set_result(pb.Snapshot(name=request_id))
        else:
            job.set_exception(FailedPrecondition("no"))
        self._settle(request_id, "SUCCEEDED" if well else "FAILED")

    @precondition(lambda self: self._live)
    @rule(data=st.data(), closed=st.booleans())
    def cancel(self, data: st.DataObject, closed: bool) -> None:
        request_id, job = self._some(data)
        if closed:
            job.close()
        waits = not job.running()
        assert self._live[request_id].cancel() == (waits or not closed, waits)
        if not waits and not closed:
            with pytest.raises(Cancelled):
                job.progress(0, 1, "a")
            job.set_exception(Cancelled("as asked", reason="JOB_CANCELLED"))
        if waits or not closed:
            self._settle(request_id, "CANCELLED")

    def _settle(self, request_id: str, state: str) -> None:
        self._model[request_id][2] = state
        assert NAMES[self._runner.run(ended(self._live.pop(request_id))).state] == state

    @rule()
    def kill(self) -> None:
        """What had not ended has been interrupted."""
        self._books.close()
        self._books = Books(Path(self._folder.name))
        self._desk = Desk(self._books)
        for request_id in self._live:
            self._model[request_id][2] = "FAILED"
        self._live.clear()

    @invariant()
    def what_is_read_is_what_was_done(self) -> None:
        page = self._runner.run(self._desk.operations.page(2**62, (), 9))
        assert {row.operation_id for row in page} == {each[0] for each in self._model.values()}
        for request_id, (operation_id, _, state) in self._model.items():
            for ids in ((operation_id, ""), ("", request_id)):
                found = self._runner.run(self._desk.operations.find(*ids))
                assert found and found.row.operation_id == operation_id
                if state in ENDED:
                    assert NAMES[found.row.state] == state
                    assert (found.message().snapshot.name == request_id) == (state == "SUCCEEDED")
                else:
                    assert found is self._live[request_id]

    def teardown(self) -> None:
        self._books.close()
        self._runner.close()
        self._folder.cleanup()


TestOperations = OperationMachine.TestCase
TestOperations.settings = settings(
    max_examples=15, stateful_step_count=20, suppress_health_check=list(HealthCheck)
)

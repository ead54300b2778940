"""A model owner with its watch, as the training server has them, and ways to wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.config import Settings
from apollo_trainer.engine.engine_watch import EngineWatch
from apollo_trainer.engine.owner import ModelOwner
from apollo_trainer.engine.status_board import StatusBoard
from apollo_trainer.ledger.events import EventLog
from apollo_trainer.runs.queue import RunQueue
from apollo_trainer.runs.run import prepare_run
from apollo_trainer.weights.sidecar import Sidecar
from tests.books import Books
from tests.waiting import HANG, wait_until


class Trainer:
    """The training server without its gRPC services."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.board = StatusBoard("test", "no engine yet")
        self.sidecar = Sidecar(settings.sidecar)
        self.owner = ModelOwner(self.sidecar, self.board, settings)
        self.queue = RunQueue(self.owner, self.board, settings)
        self.watch = EngineWatch(self.sidecar, self.owner)

    @property
    def status(self) -> status_pb2.ServerStatus:
        return self.board.snapshot()

    def wait_for(self, state: int, epoch: str = "") -> status_pb2.ServerStatus:
        """Waits for an attachment state, of a certain engine where one is given."""
        wait_until(
            lambda: self.status.attachment == state and epoch in ("", self.status.engine_epoch),
            status_pb2.AttachmentState.Name(state),
        )
        return self.status

    def submit(self, request_id: str = "", **spec: Any) -> EventLog:
        """Submits a run; without samples of one short sample."""
        tokens = pb.TokenSample(context_ids=[60, 61, 62], continuation_ids=[70, 71, 72, 73])
        spec.setdefault("samples", [pb.Sample(tokens=tokens)])
        # A run of a test takes the steps that it is told to, also where it learns fast.
        spec.setdefault("guard", pb.Guard(min_loss=0))
        asked, session = pb.RunSpec(**spec), self.owner.session()
        run = prepare_run(asked, session.limits, self.sidecar.tokenize)
        run_id = self.queue.submit(run, asked, request_id).result(HANG)
        log = self.queue.log_of(run_id)
        assert log
        return log

    def stop(self) -> None:
        self.queue.stop()
        self.watch.stop()


def kinds_of(events: list[pb.RunEvent]) -> list[str]:
    return [str(event.WhichOneof("event")) for event in events]


@pytest.fixture
def kinds() -> Callable[[list[pb.RunEvent]], list[str]]:
    """Names of events, in order."""
    return kinds_of


@pytest.fixture
def all_events() -> Callable[[EventLog], list[pb.RunEvent]]:
    """Every event of a run, once it has finished; their numbers have no gap."""

    async def collect(log: EventLog) -> list[pb.RunEvent]:
        async with asyncio.timeout(HANG):
            return [event async for event in log.follow()]

    def get(log: EventLog) -> list[pb.RunEvent]:
        events = asyncio.run(collect(log))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        return events

    return get


@pytest.fixture
def start_trainer(state_dir: Path, sidecar_address: str) -> Iterator[Callable[..., Trainer]]:
    """Starts a `Trainer`; all that a test left running are stopped at the end."""
    started: list[Trainer] = []

    def start(**settings: Any) -> Trainer:
        chosen = {"rank": 8, "state_dir": state_dir, "sidecar": sidecar_address}
        # It takes as long as all else of an attachment; what tests start as processes does it.
        chosen |= {"probe_weights": False} | settings
        started.append(Trainer(Settings(**chosen)))
        return started[-1]

    yield start
    for trainer in started:
        if trainer.owner._thread.is_alive():
            trainer.stop()


@pytest.fixture
def attached(start_engine: Callable[..., Any], start_trainer: Callable[..., Trainer]) -> Any:
    """An engine, and a trainer attached to it."""
    engine, trainer = start_engine(), start_trainer()
    trainer.wait_for(status_pb2.ATTACHMENT_STATE_ATTACHED)
    return engine, trainer


@pytest.fixture
def open_books(state_dir: Path) -> Iterator[Callable[..., Books]]:
    """Opens the ledger of the state folder."""
    opened: list[Books] = []

    def start(**options: Any) -> Books:
        opened.append(Books(state_dir, **options))
        return opened[-1]

    yield start
    for books in opened:
        if books.writer._thread.is_alive():
            books.close()

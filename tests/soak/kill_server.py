"""The training server killed at random instants while a client trains with retries."""

from __future__ import annotations

import random
import signal
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise

from apollo_client import ApolloClient
from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import training_pb2 as pb
from tests.server_process import ServerProcess
from tests.waiting import wait_until

SAMPLE = {"context_ids": [60, 61, 62], "continuation_ids": [70, 71, 72, 73]}
LONGEST_LIFE_SECONDS = 1.5
RETRY_SECONDS = 120.0
# A killed server's pause ends soon, and most runs are saved in their middle.
SETTINGS = {"APOLLO_LEASE_SECONDS": "1", "APOLLO_SAVE_SECONDS": "0.2"}


@dataclass
class Outcome:
    """What was seen.

    Attributes:
        told: the events of each run as its client read them, over all restarts, by run id.
        kept: the same, asked for at the end.
        watched: the events of all runs as one reader read them, over all restarts.
        runs: as the ledger lists them, oldest first.
        optimizer_step: of the live optimizer at the end.
    """

    told: dict[str, list[pb.RunEvent]] = field(default_factory=dict)
    kept: dict[str, list[pb.RunEvent]] = field(default_factory=dict)
    watched: list[pb.WatchRunsResponse] = field(default_factory=list)
    runs: list[pb.Run] = field(default_factory=list)
    optimizer_step: int = 0


class Client(threading.Thread):
    """Trains one run after the other until it is told to stop."""

    def __init__(self, address: str, seed: int):
        super().__init__(daemon=True)
        self.stopped, self.told = threading.Event(), dict[str, list[pb.RunEvent]]()
        self.error: BaseException | None = None
        self._address, self._draw = address, random.Random(seed)

    def run(self) -> None:
        try:
            with ApolloClient(self._address, retry_seconds=RETRY_SECONDS) as client:
                while not self.stopped.is_set():
                    self._train(client, f"{self._draw.getrandbits(64):x}")
        except BaseException as error:
            self.error = error

    def _train(self, client: ApolloClient, request_id: str) -> None:
        epochs = self._draw.choice([1, 5, 40, 400])
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                options = {"epochs": epochs, "request_id": request_id}
                events = list(client.train([SAMPLE], **options))
            except Unavailable:
                # Nobody listened yet: nothing was heard of this run.
                assert time.monotonic() < deadline
                time.sleep(0.05)
                continue
            self.told[events[0].run_id] = events
            return


class Reader(threading.Thread):
    """Reads the events of all runs, from the first, until it is told how many there are."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        self.read, self.error = list[pb.WatchRunsResponse](), list[BaseException]()
        self._client = ApolloClient(address, retry_seconds=RETRY_SECONDS)
        self._stream = self._client.watch_runs(after_revision=0)

    def run(self) -> None:
        try:
            for each in self._stream:
                if each.HasField("event"):
                    self.read.append(each)
        except BaseException as error:
            self.error.append(error)

    def end(self, count: int) -> list[pb.WatchRunsResponse]:
        """What it read, once that is so much."""
        wait_until(lambda: len(self.read) >= count or self.error, "the events of all runs")
        assert not self.error, self.error
        self._stream.close()
        self.join(RETRY_SECONDS)
        self._client.close()
        return self.read


def kill_again_and_again(
    serving: AbstractContextManager[ServerProcess], kills: int, seed: int
) -> Outcome:
    """Trains and kills, lets the last runs end, and asks for everything."""
    draw = random.Random(seed)
    with serving as server:
        clients = [Client(server.address, seed + n) for n in range(2)]
        reader = Reader(server.address)
        for thread in (*clients, reader):
            thread.start()
        for number in range(kills):
            _live(server, draw)
            server.end(signal.SIGKILL)
            server.start()
            print(f"killed {number + 1} of {kills}", flush=True)
        server.wait_attached()
        for client in clients:
            client.stopped.set()
        for client in clients:
            client.join(RETRY_SECONDS)
            assert not client.is_alive()
            assert client.error is None, client.error
        outcome = _ask(server, clients)
        outcome.watched = reader.end(sum(map(len, outcome.kept.values())))
        return outcome


def _live(server: ServerProcess, draw: random.Random) -> None:
    """Some are killed while they start, attach or compile, most while they train."""
    kind = draw.random()
    if kind < 0.7:
        server.wait_for_steps(1)
    elif kind < 0.9:
        server.wait_attached()
    time.sleep(draw.uniform(0, LONGEST_LIFE_SECONDS))


def _ask(server: ServerProcess, clients: list[Client]) -> Outcome:
    outcome = Outcome()
    for client in clients:
        outcome.told.update(client.told)
    with ApolloClient(server.address) as client:
        token = ""
        while True:
            page = client.list_runs(page_size=100, page_token=token)
            outcome.runs[:0] = reversed(page.runs)
            if not (token := page.next_page_token):
                break
        for run in outcome.runs:
            outcome.kept[run.run_id] = list(client.watch_run(run.run_id))
        outcome.optimizer_step = client.status().optimizer_step
    return outcome


def require_nothing_lost(outcome: Outcome) -> None:
    """Every promise of the ledger, checked on what was seen."""
    require_watched(outcome)
    for run_id, told in outcome.told.items():
        assert told == outcome.kept[run_id], f"run {run_id} was told otherwise than it is kept"
    for run in outcome.runs:
        _require_whole(run, outcome.kept[run.run_id])
    began = [_started(outcome.kept[run.run_id]) for run in outcome.runs]
    trained = [(start, run) for start, run in zip(began, outcome.runs, strict=True) if start]
    for (start, run), (later, _) in pairwise(trained):
        assert later.optimizer_step == start.optimizer_step + run.steps_done
    start, run = trained[-1]
    assert outcome.optimizer_step == start.optimizer_step + run.steps_done


def require_watched(outcome: Outcome) -> None:
    """All runs' events were read, each once, in one order that is that of each run as well."""
    revisions = [each.revision for each in outcome.watched]
    assert revisions == sorted(set(revisions))
    read: dict[str, list[pb.RunEvent]] = {}
    for each in outcome.watched:
        read.setdefault(each.event.run_id, []).append(each.event)
    assert read == outcome.kept


def _started(events: list[pb.RunEvent]) -> pb.RunEvent.Started | None:
    return next((event.started for event in events if event.HasField("started")), None)


def _require_whole(run: pb.Run, events: list[pb.RunEvent]) -> None:
    assert [event.sequence for event in events] == list(range(1, run.last_sequence + 1))
    finished = [event.finished for event in events if event.HasField("finished")]
    assert len(finished) == 1
    assert events[-1].finished == finished[0]
    assert run.state == finished[0].state
    assert run.steps_done == finished[0].steps_done
    steps = [event.step for event in events if event.HasField("step")]
    assert [step.step for step in steps] == list(range(1, run.steps_done + 1))
    start = _started(events)
    numbers = [step.optimizer_step for step in steps]
    if start:
        first = start.optimizer_step + 1
        assert numbers == list(range(first, first + run.steps_done))
    if run.state == pb.RUN_STATE_FAILED:
        assert run.failure.reason == "INTERRUPTED", run.failure
        assert finished[0].state_steps_lost <= run.steps_done


def summary(outcome: Outcome) -> str:
    """Figures for a report."""
    interrupted = [e[-1].finished for e in outcome.kept.values() if e[-1].finished.failure.reason]
    in_doubt = sum(finished.next_step_in_doubt for finished in interrupted)
    events = sum(len(events) for events in outcome.kept.values())
    return (
        f"{len(outcome.runs)} runs, {events} events, {len(interrupted)} runs interrupted "
        f"({in_doubt} of them in the middle of a write), optimizer step {outcome.optimizer_step}"
    )

"""A full disk, wherever it is: every call ends, so does the server, and all goes on with room."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from apollo_grpc.errors import ApolloError, FailedPrecondition
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.v1 import checkpoint_pb2 as cp
from apollo_grpc.v1 import training_pb2 as pb
from tests.checkpoints.private_mounts import fill, tmpfs, with_private_mounts
from tests.services.test_ends import END_SECONDS, look
from tests.waiting import HANG, wait_until

FAST = pb.OptimizerConfig(lr=1e-2)


class Stream:
    """A stream that is read in the background: its events, or updates, and what it ended with."""

    def __init__(self, call: Any):
        self.answers: list[Any] = []
        self.error: ApolloError | None = None
        self._thread = threading.Thread(target=self._read, args=[call], daemon=True)
        self._thread.start()

    def _read(self, call: Any) -> None:
        try:
            for answer in call:
                self.answers.append(answer)
        except grpc.RpcError as error:
            self.error = from_rpc_error(error)

    def end(self) -> Stream:
        self._thread.join(HANG)
        assert not self._thread.is_alive(), "a call that waits for ever"
        return self

    def warned(self, reason: str) -> bool:
        return any(answer.event.warning.reason == reason for answer in self.answers)


class Server:
    """A server with one of its folders on a small disk; call `start` within the test."""

    def __init__(self, state_dir: Path, model: Path, tiny: Path, engine: Any, server: Any):
        self._model, self._tiny = model, tiny
        self._start_engine, self._start_server = engine, server
        # The sockets are elsewhere: threads that do not see the mounts connect to them.
        self._state = state_dir / "state"
        self.disk = self._state

    def start(self, place: str) -> Any:
        places = {"journal": self._state / "journal", "models": self._state / "models"}
        self.disk = self._model.parent if place == "model" else places.get(place, self._state)
        self.disk.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._state.mkdir(mode=0o700, exist_ok=True)
        self._state.chmod(0o700)
        tmpfs(self.disk, "4M").chmod(0o700)
        if place == "model":
            shutil.copytree(self._tiny, self._model)
        self._start_engine()
        caller = self._start_server(state_dir=self._state)
        caller.wait_attached()
        list(caller.checkpoints.CreateSnapshot(cp.CreateSnapshotRequest(name="a"), timeout=HANG))
        return caller


@pytest.fixture
def server(
    state_dir: Path, model_folder: Path, tiny_model: Path, start_engine: Any, start_server: Any
) -> Server:
    return Server(state_dir, model_folder, tiny_model, start_engine, start_server)


def fill_up(disk: Path) -> Path:
    """Leaves no byte of a disk that a run writes to meanwhile."""
    while True:
        try:
            return fill(disk, 0)
        except OSError:
            # What was free a moment ago is taken.
            continue


def state_of(run: Stream) -> int:
    return int(run.end().answers[-1].event.finished.state)


@pytest.mark.parametrize("place", ["ledger", "journal", "models", "model"])
@with_private_mounts
def test_calls_end_beside_a_full_disk_and_work_when_there_is_room(
    place: str, server: Server
) -> None:
    caller = server.start(place)
    run = Stream(caller.start(epochs=100_000, optimizer=FAST))
    waiting = Stream(caller.start("waiting"))
    doomed = Stream(caller.start("doomed"))
    wait_until(lambda: waiting.answers and doomed.answers and len(run.answers) > 5, "the runs")
    filler = fill_up(server.disk)
    if place == "ledger":
        wait_until(lambda: run.warned("LEDGER_NOT_WRITTEN"), "the warning")
    run_id = run.answers[0].event.run_id
    look(caller, run_id)
    new = [Stream(caller.start(f"new {n}", epochs=2)) for n in range(3)]
    jobs = [
        Stream(caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG)),
        Stream(caller.checkpoints.CreateSnapshot(cp.CreateSnapshotRequest(name="b"), timeout=HANG)),
    ]
    look(caller, run_id)
    assert caller.cancel(doomed.answers[0].event.run_id).state == pb.RUN_STATE_CANCELLED
    assert state_of(doomed) == pb.RUN_STATE_CANCELLED
    caller.cancel(run_id)
    assert state_of(run) == pb.RUN_STATE_CANCELLED
    assert state_of(waiting) == pb.RUN_STATE_SUCCEEDED
    for stream in (*new, *jobs):
        error = stream.end().error
        assert error is None or isinstance(error, FailedPrecondition)
        assert error is None or "ake room" in error.message
    refused = {"ledger": new, "model": jobs}.get(place, [])
    assert [stream for stream in (*new, *jobs) if stream.error] == refused
    assert run.warned("STATE_NOT_SAVED") == (place in ("ledger", "models"))
    look(caller, run_id)
    filler.unlink()
    assert caller.train("again", epochs=2)[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    wait_until(lambda: caller.run(run_id).state == pb.RUN_STATE_CANCELLED, "the ledger")
    assert caller.events_of(run_id)[-1].finished.steps_done > 0
    *_, synced = caller.checkpoints.Sync(cp.SyncRequest(), timeout=HANG)
    assert synced.HasField("result")


@pytest.mark.parametrize("place", ["ledger", "journal", "models", "model"])
@with_private_mounts
def test_the_server_ends_beside_a_full_disk(place: str, server: Server) -> None:
    caller = server.start(place)
    run = Stream(caller.start(epochs=100_000, optimizer=FAST))
    waiting = Stream(caller.start("waiting"))
    wait_until(lambda: waiting.answers and len(run.answers) > 5, "the runs")
    fill_up(server.disk)
    if place == "ledger":
        wait_until(lambda: run.warned("LEDGER_NOT_WRITTEN"), "the warning")
    snapshot = cp.CreateSnapshotRequest(name="b")
    jobs = [Stream(caller.checkpoints.CreateSnapshot(snapshot, timeout=HANG)) for _ in range(3)]
    look(caller, run.answers[0].event.run_id)
    began = time.monotonic()
    caller.terminate()
    assert time.monotonic() - began < END_SECONDS
    assert run.end().answers[-1].event.finished.failure.reason == "SERVER_STOPPED"
    for stream in (waiting, *jobs):
        error = stream.end().error
        assert error
        assert error.reason == "SERVER_STOPPING"

"""The real training server on a unix socket, in this process or as one of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import apollo_trainer.main as server_module
from apollo_grpc.errors import ApolloError
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub
from apollo_trainer.config import Settings
from tests import programs
from tests.waiting import HANG, wait_until


def short_spec(**spec: Any) -> pb.RunSpec:
    """Without samples of one short sample."""
    tokens = pb.TokenSample(context_ids=[60, 61, 62], continuation_ids=[70, 71, 72, 73])
    spec.setdefault("samples", [pb.Sample(tokens=tokens)])
    # A run of a test takes the steps that it is told to, also where it learns fast.
    spec.setdefault("guard", pb.Guard(min_loss=0))
    return pb.RunSpec(**spec)


class Caller:
    """Stubs of every service on one channel."""

    def __init__(self, address: str):
        self.address, self.channel = address, Endpoint(address).channel()
        self.training = TrainingServiceStub(self.channel)
        self.status_service = StatusServiceStub(self.channel)
        self.checkpoints = CheckpointServiceStub(self.channel)
        self.stop: Callable[[], None] = lambda: None
        self.terminate: Callable[[], None] = lambda: None
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def status(self) -> status_pb2.ServerStatus:
        request = status_pb2.GetStatusRequest()
        return self.status_service.GetStatus(request, timeout=HANG).status

    def watch(self, **fields: Any) -> Any:
        return self.status_service.WatchStatus(
            status_pb2.WatchStatusRequest(**fields), timeout=HANG
        )

    def start(self, request_id: str = "", **spec: Any) -> Any:
        """The stream of a run; without samples of one short sample."""
        request = pb.TrainRequest(request_id=request_id, spec=short_spec(**spec))
        return self.training.Train(request, timeout=HANG)

    def create(self, request_id: str = "", **spec: Any) -> pb.Run:
        """The same run, by CreateRun."""
        request = pb.CreateRunRequest(request_id=request_id, spec=short_spec(**spec))
        return self.training.CreateRun(request, timeout=HANG).run

    def delete(self, run_id: str) -> None:
        self.training.DeleteRun(pb.DeleteRunRequest(run_id=run_id), timeout=HANG)

    def watch_runs(self, after: int | None = None) -> Any:
        """The stream of all runs' events."""
        return self.training.WatchRuns(pb.WatchRunsRequest(after_revision=after), timeout=HANG)

    def events_of(self, run_id: str, after: int = 0) -> list[pb.RunEvent]:
        """The rest of a run's events, by WatchRun."""
        request = pb.WatchRunRequest(run_id=run_id, after_sequence=after)
        return [answer.event for answer in self.training.WatchRun(request, timeout=HANG)]

    def run(self, run_id: str, view: pb.RunView = pb.RUN_VIEW_BASIC) -> pb.Run:
        request = pb.GetRunRequest(run_id=run_id, view=view)
        return self.training.GetRun(request, timeout=HANG).run

    def cancel(self, run_id: str) -> pb.Run:
        request = pb.CancelRunRequest(run_id=run_id)
        return self.training.CancelRun(request, timeout=HANG).run

    def list(self, **fields: Any) -> pb.ListRunsResponse:
        return self.training.ListRuns(pb.ListRunsRequest(**fields), timeout=HANG)

    def train(self, request_id: str = "", **spec: Any) -> list[pb.RunEvent]:
        return [answer.event for answer in self.start(request_id, **spec)]

    def wait_attached(self) -> None:
        state = status_pb2.ATTACHMENT_STATE_ATTACHED
        wait_until(lambda: self.status().attachment == state, "the attachment")

    def serves(self) -> bool:
        try:
            answer = self.health.Check(health_pb2.HealthCheckRequest(), timeout=HANG)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class ServerThread:
    """A TrainingServer on an event loop in a thread."""

    def __init__(
        self,
        settings: Settings,
        patch: pytest.MonkeyPatch,
        serves: Callable[[], Any] | None = None,
    ):
        self._loop, self._signals = asyncio.new_event_loop(), {}
        # Only a main thread can have signal handlers; the server's own is kept to stop it.
        patch.setattr(
            self._loop, "add_signal_handler", lambda n, handler: self._signals.update({n: handler})
        )
        self._thread = threading.Thread(target=self._serve, args=[settings], daemon=True)
        self._thread.start()
        self.caller = Caller(settings.address)
        self.caller.stop, self.caller.terminate = self.stop, self.terminate
        wait_until(serves or self.caller.serves, "the training server")

    def _serve(self, settings: Settings) -> None:
        async def serve() -> None:
            await server_module.TrainingServer(settings).serve()

        self._loop.run_until_complete(serve())
        # As `asyncio.run` does: a thread that waits for something would hold up the end.
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def stop(self) -> None:
        """Ends the server as SIGTERM does. Idempotent."""
        if not self._thread.is_alive():
            return
        self.caller.channel.close()
        self.terminate()

    def terminate(self) -> None:
        """SIGTERM, while callers are still there; returns when the server has ended."""
        self._loop.call_soon_threadsafe(self._signals[signal.SIGTERM])
        self._thread.join(HANG)
        assert not self._thread.is_alive()


@pytest.fixture
def start_server(
    state_dir: Path, sidecar_address: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Caller]]:
    """Starts a training server in this process and returns a caller of it."""
    started: list[ServerThread] = []

    def start(**settings: Any) -> Caller:
        chosen = {"rank": 8, "state_dir": state_dir, "sidecar": sidecar_address}
        # It takes as long as all else of an attachment; what tests start as processes does it.
        chosen |= {"probe_weights": False} | settings
        chosen.setdefault("address", f"unix:{state_dir}/training.sock")
        started.append(ServerThread(Settings(**chosen), monkeypatch))
        return started[-1].caller

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def caller(start_engine: Callable[..., Any], start_server: Callable[..., Caller]) -> Caller:
    """A caller of a server that is attached to an engine."""
    start_engine()
    made = start_server()
    made.wait_attached()
    return made


@pytest.fixture
def error_of() -> Callable[[Any], ApolloError]:
    """The domain error that a call ends with; it must end with one."""

    def get(call: Any) -> ApolloError:
        with pytest.raises(grpc.RpcError) as caught:
            list(call) if hasattr(call, "__next__") else call()
        return from_rpc_error(caught.value)

    return get


@pytest.fixture
def start_process(state_dir: Path, tmp_path: Path) -> Iterator[Callable[..., programs.Program]]:
    """Starts the training server, its log in `tmp_path`; what runs at the end is killed."""
    started: list[programs.Program] = []

    def start(*arguments: str) -> programs.Program:
        environment = os.environ | {"APOLLO_STATE_DIR": str(state_dir), "OMP_NUM_THREADS": "1"}
        log = tmp_path / "server.log"
        started.append(programs.start(programs.SERVER, *arguments, env=environment, log=log))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(HANG)


@pytest.fixture
def call_at() -> Callable[[str], Caller]:
    return Caller

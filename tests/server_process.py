"""A training server as a process that can be killed, beside an engine that lives on."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_client import ApolloClient
from apollo_grpc.errors import DeadlineExceeded, Unavailable
from apollo_grpc.v1 import status_pb2
from tests import programs
from tests.engine_double import EngineDouble
from tests.waiting import HANG, wait_until

ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED


class ServerProcess:
    """`apollo_trainer.main` in a state folder of its own; it is not started by this.

    Args:
        folder: private, with a short path.
        settings: of the server, as environment variables.

    Attributes:
        engine: the one in this process, where `served` started it.
    """

    engine: EngineDouble

    def __init__(self, folder: Path, **settings: str):
        self.folder, self.address = folder, f"unix:{folder}/training.sock"
        self._environment = (
            os.environ | {"APOLLO_STATE_DIR": str(folder), "OMP_NUM_THREADS": "1"} | settings
        )
        self._process: programs.Program | None = None

    def start(self, before: Callable[[], None] | None = None) -> None:
        """Starts it; `wait_attached` waits for it.

        Args:
            before: of a module's own, called in the new process before it serves.
        """
        log = self.folder / "server.log"
        self._process = programs.start(
            programs.SERVER, "--rank", "8", env=self._environment, log=log, before=before
        )

    def status(self) -> status_pb2.ServerStatus | None:
        """Its status; None while nobody answers."""
        with ApolloClient(self.address) as client:
            try:
                return client.status()
            except (Unavailable, DeadlineExceeded):
                return None

    def wait_attached(self) -> status_pb2.ServerStatus:
        """Waits for the engine; returns the status."""

        found = list[status_pb2.ServerStatus]()

        def attached() -> bool:
            status = self.status()
            if status is None or status.attachment != ATTACHED:
                return False
            found.append(status)
            return True

        wait_until(attached, "the attachment")
        return found[0]

    def wait_for_steps(self, count: int) -> None:
        """Waits until the attached server has taken so many steps more than it has now."""
        before = self.wait_attached().optimizer_step

        def taken() -> bool:
            status = self.status()
            return status is not None and status.optimizer_step >= before + count

        wait_until(taken, "the steps", seconds=120.0)

    def memory_kib(self) -> int:
        """Resident memory now."""
        assert self._process
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signals it and returns how it ended."""
        assert self._process
        self._process.send_signal(number)
        return self.wait_ended()

    def wait_ended(self) -> int:
        """Waits for the end that it comes to by itself; returns how it ended."""
        assert self._process
        process, self._process = self._process, None
        return process.wait(HANG)

    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "server.log").read_text()


@contextmanager
def served(
    model: Path, before: Callable[[], None] | None = None, **settings: str
) -> Iterator[ServerProcess]:
    """An attached server on a model directory, with an engine in this process.

    Args:
        before: as of `ServerProcess.start`, the first time.
    """
    with tempfile.TemporaryDirectory(prefix="apollo-") as folder:
        server = ServerProcess(Path(folder), **settings)
        engine = server.engine = EngineDouble(model, f"unix:{folder}/sidecar.sock")
        server.start(before)
        try:
            server.wait_attached()
            yield server
        finally:
            if server._process:
                server.end(signal.SIGKILL)
            engine.stop()

"""A fake training server: the contract on a real socket, and no model behind it."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from apollo_client.testing.calls import Calls
from apollo_client.testing.checkpoints import Checkpoints
from apollo_client.testing.datasets import Datasets
from apollo_client.testing.memory import ENDED, KeptOperation, KeptRun, Memory
from apollo_client.testing.operations import carry_out, end
from apollo_client.testing.playing import Playing, ServerEnded
from apollo_client.testing.samples import Samples
from apollo_client.testing.script import Script
from apollo_client.testing.status import Status
from apollo_client.testing.training import Training
from apollo_grpc.errors import Unavailable
from apollo_grpc.transport import SERVER_OPTIONS, OpenPort, open_port
from apollo_grpc.v1 import training_pb2 as pb

# Each call that is open has one.
MAX_CALLS = 128


class FakeServer:
    """A server of apollo.v1 for tests, on a unix socket of its own, in threads of this process.

    It takes runs, datasets and operations on checkpoints as a training server does, one at a time
    and in order, and keeps them over restarts. No model learns: each run plays the script.

    Args:
        losses, fail_with, fail_at_step, step_seconds: as in `Script`, of every run.
        max_queued_runs: that may wait; one more is refused (QUEUE_FULL).

    Attributes:
        address: for clients; the same after a restart.
    """

    def __init__(
        self,
        losses: Sequence[float] = Script.losses,
        *,
        fail_with: tuple[str, str] | None = None,
        fail_at_step: int = 1,
        step_seconds: float = Script.step_seconds,
        max_queued_runs: int = 1000,
    ):
        script = Script(losses, fail_with, fail_at_step, step_seconds)
        self._memory = Memory(script, max_queued_runs)
        self._folder = tempfile.TemporaryDirectory(prefix="apollo-")
        self._socket = Path(self._folder.name) / "training.sock"
        self.address = f"unix:{self._socket}"
        self._ended, self._worker = threading.Event(), threading.Thread()
        self._server: grpc.Server | None = None
        self._port: OpenPort | None = None

    def play(
        self,
        losses: Sequence[float] = Script.losses,
        *,
        fail_with: tuple[str, str] | None = None,
        fail_at_step: int = 1,
        step_seconds: float = Script.step_seconds,
    ) -> None:
        """What runs play that begin from now on."""
        self._memory.script = Script(losses, fail_with, fail_at_step, step_seconds)

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Serves, with what was kept; what waited has its turn."""
        assert self._server is None, "the server serves already"
        pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="fake-call")
        memory = self._memory
        services: list[Any] = [Training(memory), Samples(memory), Datasets(memory)]
        services += [Checkpoints(memory), Status(memory)]
        self._server = grpc.server(pool, [Calls(services, memory.wake)], options=SERVER_OPTIONS)
        self._port = open_port(self._server, self.address)
        self._ended = threading.Event()
        self._worker = threading.Thread(target=self._work, args=[self._ended], daemon=True)
        self._worker.start()
        self._server.start()

    def stop(self, *, killed: bool = True) -> None:
        """Takes the socket away. The run at work ends, as its readers are told after `start`.

        Args:
            killed: the run ends as INTERRUPTED, as after a kill; else as SERVER_STOPPED, as after
                SIGTERM. What waits is kept in either case, but operations, which fail.
        """
        if self._server is None:
            return
        self._ended.set()
        self._memory.wake()
        self._worker.join()
        self._server.stop(None).wait()
        self._server = None
        self._socket.unlink(missing_ok=True)
        if self._port:
            self._port.release()
        self._end_what_ran(killed)

    def restart(self, *, killed: bool = True) -> None:
        """Stops and starts: clients lose their connection, and read on."""
        self.stop(killed=killed)
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._folder.cleanup()

    # --- work ---------------------------------------------------------------------------------

    def _work(self, ended: threading.Event) -> None:
        """Takes what waits, one at a time. The server's own thread."""
        memory = self._memory
        while True:
            with memory.changed:
                memory.changed.wait_for(lambda: memory.jobs or ended.is_set())
                if ended.is_set():
                    return
                job = memory.active = memory.jobs.pop(0)
            try:
                if isinstance(job, KeptRun):
                    Playing(memory, job, ended).play()
                else:
                    carry_out(memory, job, ended)
            except ServerEnded:
                return
            with memory.changed:
                memory.active = None
                memory.wake()

    def _end_what_ran(self, killed: bool) -> None:
        """A run at work has been cut off, and so has each operation; runs that wait are kept."""
        memory = self._memory
        words = "The training server was killed before this ended."
        lost = Unavailable(words, reason="OPERATION_INTERRUPTED")
        with memory.changed:
            operations = [j for j in (*memory.jobs, memory.active) if isinstance(j, KeptOperation)]
            for operation in operations:
                end(memory, operation, lost)
            memory.jobs = [job for job in memory.jobs if isinstance(job, KeptRun)]
            run, memory.active = memory.active, None
            if isinstance(run, KeptRun) and run.run.state not in ENDED:
                self._cut_off(run, killed)

    def _cut_off(self, kept: KeptRun, killed: bool) -> None:
        run = kept.run
        reason, words = "SERVER_STOPPED", "The server was stopped during this run."
        if killed:
            reason, words = "INTERRUPTED", "The training server ended during this run."
        words += f" {run.steps_done} of {run.steps_total} steps are in the weights."
        told = pb.RunEvent.Finished(state=pb.RUN_STATE_FAILED, steps_done=run.steps_done)
        if run.spec.HasField("accept_if") and not run.spec.dry_run:
            # It is kept only where it was accepted.
            self._memory.take_back(run.steps_done)
            told.steps_done, words = 0, f"{words} They were taken back."
        told.failure.CopyFrom(pb.Notice(reason=reason, message=f"{words} Send it as a new run."))
        if not killed:
            told.weight_version = self._memory.weight_version
        self._memory.append(kept, finished=told)

"""Two child processes, together: logs with a name before each line, one end for both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from apollo_client.aio import AsyncApolloClient
from apollo_client.command import launch
from apollo_grpc.errors import ApolloError
from apollo_grpc.v1 import status_pb2

# The training server finishes its step and saves its state; vLLM frees its workers.
STOP_SECONDS = 60.0
POLL_SECONDS = 0.5
MAX_LINE_BYTES = 2**20
_DECIDED = (status_pb2.ATTACHMENT_STATE_ATTACHED, status_pb2.ATTACHMENT_STATE_REFUSED)
_COLOURS = {"vllm": typer.colors.BLUE, "trainer": typer.colors.GREEN}


@dataclass(frozen=True)
class Child:
    """How one process is started.

    Attributes:
        cores: that it runs on; None for all.
        listens: host and port of its HTTP server.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    cores: Sequence[int] | None = None
    listens: tuple[str, int] | None = None

    async def start(self) -> asyncio.subprocess.Process:
        """Starts it in a session of its own: Ctrl-C in the terminal would reach it otherwise."""
        cores = ",".join(str(core) for core in self.cores or ())
        return await asyncio.create_subprocess_exec(
            *(sys.executable, launch.__file__, str(os.getpid()), cores, *self.command),
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )


class Children:
    """vLLM and the training server: started together, ended together.

    Args:
        address: of the training server, to ask when both are ready.
    """

    def __init__(self, vllm: Child, trainer: Child, address: str):
        self._vllm, self._trainer, self._address = vllm, trainer, address

    async def run(self) -> int:
        """Runs both until one ends or a signal comes; returns the exit status.

        The training server is ended first, so that it can save its state while the weights that
        belong to it are still there.
        """
        asked = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, asked.set)
        trainer, vllm = await self._trainer.start(), await self._vllm.start()
        logs = [
            asyncio.create_task(_prefix(child.name, process))
            for child, process in ((self._trainer, trainer), (self._vllm, vllm))
        ]
        ready = asyncio.create_task(self._tell_ready())
        first = await _first_of(asked, {self._trainer.name: trainer, self._vllm.name: vllm})
        ready.cancel()
        _say(f"{first}; stopping both" if first else "stopping both")
        for process in (trainer, vllm):
            await end(process)
        await asyncio.gather(*logs)
        _say("stopped")
        return 1 if first else 0

    async def _tell_ready(self) -> None:
        """Says once that the model can be asked and trained, or why it never will be."""
        async with AsyncApolloClient(self._address) as client:
            status = await attached(client)
        if status.attachment == status_pb2.ATTACHMENT_STATE_REFUSED:
            _say(f"vLLM serves, and cannot be trained: {status.attachment_detail}")
        elif self._vllm.listens:
            host, port = self._vllm.listens
            await _listening(host, port)
            _say(f"ready: ask vLLM at http://{host}:{port}/v1, train with 'apollo train FILE'")


async def attached(client: AsyncApolloClient) -> status_pb2.ServerStatus:
    """The first status that says attached, or refused."""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            status = await client.status()
        except ApolloError:
            continue
        if status.attachment in _DECIDED:
            return status


async def _listening(host: str, port: int) -> None:
    """Returns when somebody accepts connections: weights are there before the HTTP server is."""
    while True:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(POLL_SECONDS)
        else:
            writer.close()
            return


async def _first_of(asked: asyncio.Event, processes: dict[str, asyncio.subprocess.Process]) -> str:
    """Waits; what is returned says which process ended by itself, empty when a signal came."""
    waits = {asyncio.create_task(p.wait()): name for name, p in processes.items()}
    signalled = asyncio.create_task(asked.wait())
    done, pending = await asyncio.wait({*waits, signalled}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if signalled in done:
        return ""
    ended = next(task for task in done if task in waits)
    return f"{waits[ended]} ended by itself with status {ended.result()}"


async def end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM; then SIGKILL to whatever is left of the processes that it started."""
    if process.returncode is None:
        process.terminate()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    # What outlives its leader would keep the port, the memory and our end of its log.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _prefix(name: str, process: asyncio.subprocess.Process) -> None:
    head = typer.style(f"{name:<7} | ", fg=_COLOURS[name])
    assert process.stdout is not None
    while True:
        try:
            line = await process.stdout.readline()
        except ValueError:
            # Longer than the limit; a log that nobody reads would block its writer.
            continue
        if not line:
            return
        # Of a progress bar, which is drawn over itself, only the last state.
        text = line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
        typer.echo(head + text)


def _say(text: str) -> None:
    typer.echo(typer.style(f"apollo  | {text}", bold=True))

"""Two child processes, together: logs with a name before each line, one end for both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import typer

from apollo_client.aio import AsyncApolloClient
from apollo_client.command import launch
from apollo_client.command.ending import KEPT_LINES, ended, why_ended
from apollo_grpc.errors import ApolloError, Unavailable
from apollo_grpc.v1 import status_pb2

# The training server finishes its step and saves its state; vLLM frees its workers.
STOP_SECONDS = 60.0
POLL_SECONDS = 0.5
# A training server listens before it has anything to map.
ANSWER_SECONDS = 300.0
TELL_SECONDS = 60.0
MAX_LINE_BYTES = 2**20
_DECIDED = (status_pb2.ATTACHMENT_STATE_ATTACHED, status_pb2.ATTACHMENT_STATE_REFUSED)
_COLOURS = {"vllm": typer.colors.BLUE, "trainer": typer.colors.GREEN}


@dataclass(frozen=True)
class Child:
    """How one process is started.

    Attributes:
        cores: that it runs on; None for all.
        listens: host and port of its HTTP server; None where it has none of these.
        url: of that server, as a user asks it.
        before_kill: called with its process id where it has to be killed.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    cores: Sequence[int] | None = None
    listens: tuple[str, int] | None = None
    url: str = ""
    before_kill: Callable[[int], None] = lambda process: None

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
        answer_seconds: both are ended where it has not answered there by then.
        notes: said before anything else.
    """

    def __init__(
        self,
        vllm: Child,
        trainer: Child,
        address: str,
        answer_seconds: float = ANSWER_SECONDS,
        notes: Sequence[str] = (),
    ):
        self._vllm, self._trainer, self._address = vllm, trainer, address
        self._answer_seconds, self._notes = answer_seconds, notes
        self._unreachable = ""

    async def run(self) -> int:
        """Runs both until one ends or a signal comes; returns the exit status.

        The training server is ended first, so that it can save its state while the weights that
        belong to it are still there.
        """
        asked = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, asked.set)
        for note in self._notes:
            _say(note)
        processes = {child.name: await child.start() for child in (self._trainer, self._vllm)}
        kept = {name: deque[str](maxlen=KEPT_LINES) for name in processes}
        logs = [
            asyncio.create_task(_prefix(name, process, kept[name]))
            for name, process in processes.items()
        ]
        ready = asyncio.create_task(self._tell_ready(asked))
        first = await _first_of(asked, processes)
        ready.cancel()
        status = processes[first].returncode or 0 if first else 0
        why = ended(first, status) if first else self._unreachable
        _say(f"{why}; stopping both" if why else "stopping both")
        for child in (self._trainer, self._vllm):
            await end(processes[child.name], child.before_kill)
        await asyncio.gather(*logs)
        _say("stopped")
        if first:
            _tell_why(why, why_ended(status, kept[first]))
        return 1 if why else 0

    async def _tell_ready(self, asked: asyncio.Event) -> None:
        """Says once that the model can be asked and trained, or why it never will be.

        Sets `asked` where the training server cannot be reached.
        """
        try:
            async with AsyncApolloClient(self._address) as client:
                status = await attached(client, self._answer_seconds, _say)
        except Unavailable as error:
            self._unreachable = error.message
            asked.set()
            return
        if status.attachment == status_pb2.ATTACHMENT_STATE_REFUSED:
            _say(f"vLLM serves, and cannot be trained: {status.attachment_detail}")
            return
        if self._vllm.listens:
            await _listening(*self._vllm.listens)
        _say(f"ready: ask vLLM at {self._vllm.url}, train with 'apollo train FILE'")


async def attached(
    client: AsyncApolloClient,
    answer_seconds: float = ANSWER_SECONDS,
    tell: Callable[[str], None] = lambda _: None,
) -> status_pb2.ServerStatus:
    """The first status that says attached, or refused.

    Args:
        tell: called every minute with what is waited for.

    Raises Unavailable where no training server has answered in that time.
    """
    began = told = time.monotonic()
    answered = False
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            status = await client.status()
            if status.attachment in _DECIDED:
                return status
            answered, waits = True, status.attachment_detail
            if status.attachment == status_pb2.ATTACHMENT_STATE_DETACHED:
                waits = "vLLM has not shown its weights yet"
        except ApolloError as error:
            waits = _unanswered(error)
        if not answered and time.monotonic() - began >= answer_seconds:
            raise Unavailable(f"{waits}, {answer_seconds:g} s after its start")
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            tell(f"still waiting: {waits}")


def _unanswered(error: ApolloError) -> str:
    """Without what a caller of a server elsewhere is told to do."""
    told = error.metadata
    where = f" at {told['address']}" if "address" in told else ""
    return f"the training server does not answer{where} ({told.get('cause', error.message)})"


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
    """Waits; the name of the process that ended by itself, empty when a signal came."""
    waits = {asyncio.create_task(p.wait()): name for name, p in processes.items()}
    signalled = asyncio.create_task(asked.wait())
    done, pending = await asyncio.wait({*waits, signalled}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if signalled in done:
        return ""
    return next(waits[task] for task in done if task in waits)


async def end(
    process: asyncio.subprocess.Process, before_kill: Callable[[int], None] = lambda process: None
) -> None:
    """SIGTERM; then SIGKILL to whatever is left of the processes that it started."""
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        before_kill(process.pid)
    # What outlives its leader would keep the port, the memory and our end of its log.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _prefix(name: str, process: asyncio.subprocess.Process, kept: deque[str]) -> None:
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
        kept.append(text)
        typer.echo(head + text)


def _tell_why(what: str, lines: Sequence[str]) -> None:
    _say(f"{what}{':' if lines else ''}")
    for line in lines:
        _say(f"  {line}")


def _say(text: str) -> None:
    typer.echo(typer.style(f"apollo  | {text}", bold=True))

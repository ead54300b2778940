"""vLLM and the training server as processes of their own, forked with their imports done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from tests.waiting import HANG

VLLM = "vllm.entrypoints.openai.api_server"
VLLM_SERVE = "tests.vllm.serve_command"
SERVER = "apollo_trainer.main"
# Imported when it is needed, by whoever builds a model of it.
WITH = {SERVER: ["transformers.models.qwen3.modeling_qwen3"]}
# Set before torch and transformers are imported, which read them then.
BEFORE_IMPORTS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def untraced(environment: Mapping[str, str]) -> dict[str, str]:
    """The same for a process that imports much: to trace that takes longer than to import it."""
    return {k: v for k, v in environment.items() if not k.startswith("COVERAGE")}


def forking(environment: Mapping[str, str]) -> dict[str, str]:
    """The same for a command that starts vLLM, whose first process then forks its others."""
    return untraced(environment) | {"PYTHONPATH": str(Path(__file__).parent / "vllm" / "forking")}


class ForkServer:
    """A process that has imported modules, and forks programs that need them."""

    def __init__(self, modules: list[str]):
        environment = untraced(os.environ | BEFORE_IMPORTS)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._told, self._started = threading.Condition(), list[Program]()
        # By process id, of those that run: the system gives the ids of ended ones to others.
        self._running: dict[int, Program] = {}
        self._asking = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            answer = json.loads(line)
            with self._told:
                if "started" in answer:
                    program = self._running[answer["started"]] = Program(self, answer["started"])
                    self._started.append(program)
                else:
                    self._running.pop(answer["ended"]).returncode = answer["status"]
                self._told.notify_all()

    def start(
        self,
        module: str,
        *arguments: str,
        env: Mapping[str, str],
        log: Path,
        core: int | None,
        before: Callable[[], None] | None,
    ) -> Program:
        """Starts a module as `python -m` does, after a function of a module's own."""
        asked = {
            "module": module,
            "arguments": arguments,
            "environment": dict(env),
            "log": str(log),
            "core": core,
            "before": f"{before.__module__}:{before.__name__}" if before else None,
        }
        assert self._process.stdin
        with self._asking:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
            with self._told:
                assert self._told.wait_for(lambda: self._started, 120), "the fork server is stuck"
                return self._started.pop()

    def wait(self, program: Program, seconds: float | None) -> int | None:
        """A program's exit status; None where it has not ended by then."""
        with self._told:
            self._told.wait_for(lambda: program.returncode is not None, seconds)
            return program.returncode


class Program:
    """A running program, as `subprocess.Popen` has one: the leader of a session of its own.

    Attributes:
        returncode: its exit status, a negative signal where one ended it; None while it runs.
    """

    def __init__(self, server: ForkServer, pid: int):
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        status = self._server.wait(self, timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Signals it; nothing where it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


@cache
def fork_server(module: str) -> ForkServer:
    """The one of this test process that has imported a module and more; it ends with it."""
    return ForkServer([module, *WITH.get(module, ())])


def start(
    module: str,
    *arguments: str,
    env: Mapping[str, str],
    log: Path,
    core: int | None = None,
    before: Callable[[], None] | None = None,
) -> Program:
    """Starts vLLM or the training server with that environment; `log` is appended to.

    Args:
        core: the only one that it may use; None for all.
        before: of a module's own, called in the new process before the program begins.
    """
    imported = SERVER if module in (SERVER, "-c") else VLLM
    if imported == VLLM:
        env = untraced(env)
    server = fork_server(imported)
    return server.start(module, *arguments, env=env, log=log, core=core, before=before)


def run_beside_vllm(module: str, *arguments: object, **env: str) -> str:
    """What a module prints, run as `python -m` with vLLM imported, and more environment."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        program = start(module, *map(str, arguments), env=os.environ | env, log=log)
        assert program.wait(240) == 0, log.read_text()
        return log.read_text()


@contextmanager
def running(code: str, *arguments: object) -> Iterator[tuple[Program, BinaryIO]]:
    """Code as `python -c` runs it, with the server's imports done, and what it prints.

    It is killed at the end of the block, and has ended after it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder) / "output"
        os.mkfifo(pipe)
        program = start("-c", code, *map(str, arguments), env=os.environ, log=pipe)
        # Waits until the program has opened it, too.
        with pipe.open("rb") as output:
            try:
                yield program, output
            finally:
                program.kill()
                program.wait(HANG)


def run(code: str, *arguments: object) -> tuple[int, str]:
    """The same, to its end: its exit status, a negative signal where one ended it, and output."""
    with running(code, *arguments) as (program, output):
        text = output.read().decode()
        return program.wait(HANG), text

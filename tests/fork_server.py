"""Imports modules once, and then forks programs that need them; `tests/programs.py` starts it.

vLLM takes ten seconds of a core to import, three times for each engine; here once for all of them.
Requests and answers are lines of JSON on standard input and output. What is forked runs a module
as `python -m` does, or code as `python -c`, with an environment, a log and a core of its own, in a
session of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import sys
from typing import Any

import coverage

PR_SET_PDEATHSIG = 1


def become(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    log: str,
    core: int | None,
    before: str | None,
) -> None:
    """In a new process: the program, to its end, after `before`, a function `module:name`."""
    os.setsid()
    # An interrupted test run leaves no vLLM behind.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
        os.dup2(source, stream)
    os.environ.clear()
    os.environ.update(environment)
    # What was imported before is traced in the test's own process.
    coverage.process_startup()
    if core is not None:
        os.sched_setaffinity(0, {core})
    fork_where_vllm_spawns()
    if before:
        place, _, name = before.partition(":")
        getattr(importlib.import_module(place), name)()
    if module == "-c":
        sys.argv = [module, *arguments[1:]]
        exec(compile(arguments[0], "<code>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def fork_where_vllm_spawns() -> None:
    """On a CPU vLLM 0.32 insists on processes that import everything anew."""
    context = multiprocessing.get_context
    multiprocessing.get_context = (  # type: ignore[assignment]
        lambda method=None: context("fork" if method == "spawn" else method)
    )


def serve(modules: list[str]) -> None:
    """Until standard input ends. Returns in the processes that are forked, too."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    ended, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    selector, requests = selectors.DefaultSelector(), b""
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    selector.register(ended, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            data = os.read(key.fd, 1 << 16)
            if key.fd == ended:
                _tell_ends()
                continue
            if not data:
                return None
            *lines, requests = (requests + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    for own in (ended, woken):
                        os.close(own)
                    selector.close()
                    return become(**json.loads(line))
                _tell(started=pid)


def _tell_ends() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _tell(ended=pid, status=os.waitstatus_to_exitcode(status))


def _tell(**answer: Any) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve(sys.argv[1:])

"""A training server as a process, beside a real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server_process import ServerProcess
from tests.vllm.conftest import Stack
from tests.vllm.families import FAMILIES, Family


@contextmanager
def served_by_vllm(
    folder: Path, family: Family = FAMILIES["qwen3"], **settings: str
) -> Iterator[ServerProcess]:
    """An attached server beside a real vLLM."""
    stack = Stack(folder, "soak", family)
    stack.state.mkdir(mode=0o700)
    server = ServerProcess(stack.state, **settings)
    try:
        stack.start_vllm()
        stack.wait_serving()
        server.start()
        server.wait_attached()
        yield server
    finally:
        if server._process:
            server.end()
        stack.end("vllm")

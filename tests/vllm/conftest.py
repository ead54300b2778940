"""Real vLLM, the real training server, real sockets: started once for each model family."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apollo_client import ApolloClient
from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import status_pb2
from tests import programs
from tests.vllm.families import FAMILIES, Family
from tests.waiting import HANG

START_SECONDS = 240


class Stack:
    """One model directory with its vLLM and its training server as child processes.

    Args:
        core: 0 or 1, which of the first two vLLM has; the training server has the other.
    """

    auto_class: Any = AutoModelForCausalLM

    def __init__(
        self,
        folder: Path,
        name: str,
        family: Family | None = None,
        model: Path | None = None,
        core: int = 0,
    ):
        self._core = core
        folder.mkdir(exist_ok=True)
        self.folder, self.name, self.family = folder, name, family or FAMILIES[name]
        self.model = model or self.family.write(folder / "model")
        self.state = folder / "state"
        self.address = f"unix:{self.state}/training.sock"
        self.vllm: programs.Program | None = None
        self.server: programs.Program | None = None
        self.client = ApolloClient(self.address)
        self.environment = os.environ | {
            "APOLLO_STATE_DIR": str(self.state),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SERVER_DEV_MODE": "1",
        }

    def _start(
        self,
        name: str,
        core: int,
        module: str,
        *arguments: str,
        before: Callable[[], None] | None = None,
        **env: str,
    ) -> Any:
        environment = self.environment | {"HF_HUB_OFFLINE": "1"} | env
        log, cpu = self.folder / f"{name}.log", self._cpu(core)
        return programs.start(module, *arguments, env=environment, log=log, core=cpu, before=before)

    def _cpu(self, core: int) -> int:
        cores = sorted(os.sched_getaffinity(0))
        return cores[core % len(cores)]

    def start(self, *arguments: str) -> None:
        """Starts both at once, vLLM with these arguments; `wait_attached` waits for them."""
        self._start_server()
        self.start_vllm(*arguments)

    def start_server(self) -> None:
        """Starts the training server and waits until it answers."""
        self._start_server()
        self._wait(lambda: self._answers(), "the training server")

    def _start_server(self) -> None:
        self.server = self._start("server", 1 - self._core, programs.SERVER)

    def start_vllm(
        self,
        *arguments: str,
        plugins: str = "apollo",
        before: Callable[[], None] | None = None,
        **env: str,
    ) -> None:
        """Starts vLLM; `wait_attached` waits for it.

        Args:
            plugins: of vLLM's that are loaded; empty for none.
            before: of a module's own, called in vLLM's process before it begins.
            arguments: more of vLLM's; `--api-server-count` is one of `vllm serve` alone.
            env: more environment variables.
        """
        self.port = self.free_port()
        served = [programs.VLLM, "--model", str(self.model)]
        if "--api-server-count" in arguments:
            served = [programs.VLLM_SERVE, "serve", str(self.model)]
        self.vllm = self._start(
            "vllm",
            self._core,
            *served,
            *("--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "256"),
            *("--dtype", self.family.dtype, "--enforce-eager"),
            "--enable-prompt-tokens-details",
            *self.family.arguments,
            *arguments,
            before=before,
            VLLM_PLUGINS=plugins,
            VLLM_NO_USAGE_STATS="1",
            **(
                {"VLLM_CPU_OMP_THREADS_BIND": str(self._cpu(self._core))}
                | self.family.environment
                | env
            ),
        )

    def free_port(self) -> int:
        """A TCP port that nobody has."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def wait_attached(self) -> status_pb2.ServerStatus:
        """Waits for an attachment and for vLLM's HTTP; a refusal is an error at once."""

        def attached() -> bool:
            if not self._answers():
                return False
            status = self.client.status()
            assert status.attachment != status_pb2.ATTACHMENT_STATE_REFUSED, status
            return status.attachment == status_pb2.ATTACHMENT_STATE_ATTACHED

        self._wait(attached, "the attachment")
        self.wait_serving()
        return self.client.status()

    def wait_serving(self) -> None:
        """Waits for vLLM's HTTP server."""
        self._wait(lambda: self.serves(), "vLLM's HTTP server")

    def wait_for(self, done: Callable[[], bool], what: str) -> None:
        """Waits for what is to come whether or not a process ends meanwhile."""
        deadline = time.monotonic() + START_SECONDS
        while not done():
            assert time.monotonic() < deadline, f"{what} did not come"
            time.sleep(0.05)

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not done():
            for name, child in (("vllm", self.vllm), ("server", self.server)):
                if child and child.poll() is not None:
                    pytest.fail(f"{name} ended with {child.returncode}:\n{self.tail(name)}")
            if time.monotonic() > deadline:
                pytest.fail(f"{what} did not come:\n{self.tail('vllm')}\n{self.tail('server')}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return bool(self.client.status().server_version)
        except Unavailable:
            return False

    def serves(self) -> bool:
        """Whether vLLM's HTTP server answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as got:
                return got.status == 200
        except OSError:
            return False

    def log(self, name: str) -> str:
        """What a child printed."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def tail(self, name: str) -> str:
        """The end of a child's log."""
        return "\n".join(self.log(name).splitlines()[-30:])

    def end(self, name: str, number: int = signal.SIGTERM) -> int | None:
        """Signals a child's whole process group, waits, and returns its exit status."""
        child = getattr(self, name)
        setattr(self, name, None)
        if child is None:
            return None
        for process_signal in (number, signal.SIGKILL):
            try:
                os.killpg(child.pid, process_signal)
                return int(child.wait(HANG))
            except ProcessLookupError:
                return int(child.wait(HANG))
            except subprocess.TimeoutExpired:
                continue
        return None

    def vllm_processes(self) -> dict[str, int]:
        """Pids of vLLM's API server, and of the process that computes."""
        assert self.vllm
        pid = self.vllm.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
        (core,) = [child for child, name in commands.items() if "resource_tracker" not in name]
        return {"api server": pid, "engine core": core}

    def complete(self, prompt: list[int] | str, **fields: Any) -> dict[str, Any]:
        """vLLM's answer over its OpenAI-compatible HTTP API, greedy, one token unless told."""
        body = {"model": str(self.model), "prompt": prompt, "temperature": 0, "max_tokens": 1}
        return self.post("/v1/completions", body | fields)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """vLLM's answer to JSON, over a connection of its own."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=HANG) as answer:
            return json.load(answer)

    def engine_logprobs(self, ids: list[int]) -> torch.Tensor:
        """vLLM's log-probability of each prompt token after the first."""
        entries = self.complete(ids, prompt_logprobs=0)["choices"][0]["prompt_logprobs"][1:]
        pairs = zip(ids[1:], entries, strict=True)
        return torch.tensor([entry[str(token)]["logprob"] for token, entry in pairs])

    def directory_logits(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities [T, V] of the model as it lies on disk, by transformers."""
        # Written out step by step: it computes what a model's paper says, soft caps included.
        model = self.auto_class.from_pretrained(
            self.model, dtype=getattr(torch, self.family.dtype), attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


class Stacks:
    """Attached stacks by family, each started when it is first asked for."""

    def __init__(self, new_folder: Callable[[str], Path]):
        self._new_folder = new_folder
        self._started: dict[str, Stack] = {}
        self._core = 0

    def __call__(self, name: str, family: Family | None = None) -> Stack:
        """The stack of a family, or of the one of this name."""
        self.begin(name, family)
        stack = self._started[name]
        stack.wait_attached()
        return stack

    def begin(self, name: str, family: Family | None = None) -> None:
        """Starts a stack, without waiting: one start keeps one core busy, and there are two."""
        if name not in self._started:
            core, self._core = self._core, 1 - self._core
            stack = Stack(self._new_folder("s"), name, family, core=core)
            self._started[name] = stack
            stack.start()

    def end(self, *families: str) -> None:
        """Ends the families' processes, and all where none is named."""
        for family in families or tuple(self._started):
            stack = self._started.pop(family)
            stack.end("server")
            stack.end("vllm")


@pytest.fixture(scope="session", autouse=True)
def sockets_of_vllm() -> Iterator[None]:
    """vLLM leaves its sockets behind, by default in the folder for everybody's temporary files."""
    with (
        tempfile.TemporaryDirectory(prefix="vllm-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("VLLM_RPC_BASE_PATH", folder)
        yield


@pytest.fixture(scope="session")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stacks]:
    """Stacks that tests share; what is left of them ends with the session."""
    torch.set_num_threads(1)
    started = Stacks(tmp_path_factory.mktemp)
    yield started
    started.end()


@pytest.fixture(scope="session")
def qwen3(stacks: Stacks) -> Stack:
    """The family that most tests share."""
    return stacks("qwen3")

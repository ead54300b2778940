"""vLLM with the sidecar, and the training server, as child processes on one GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from apollo_client import ApolloClient
from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import status_pb2

START_SECONDS = 560
SERVER, ENGINE = "apollo_trainer.main", "vllm.entrypoints.openai.api_server"
PLUGIN = {"VLLM_PLUGINS": "apollo"}
# Room for the training server on the same card. With a size that is told, vLLM does not fail where
# others on the card free memory while it looks at what is left.
VLLM = (
    *("--max-model-len", "1024", "--moe-backend", "triton"),
    *("--gpu-memory-utilization", "0.35", "--kv-cache-memory-bytes", str(16 * 2**30)),
)
# After those of `VLLM`: several on one card.
SMALL = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(4 * 2**30))
# What vLLM's log says of how it computes.
SAID = re.compile(
    r"(torch\.compile took [^\n]{0,60}|Capturing CUDA graphs \(\w+\)(?=: 100%)|apollo: \d[^\n]*"
    r"|Using [\w ]*model runner|Using \w+ attention backend|Using '?\w+'? [\w ]*MoE backend)",
    re.IGNORECASE,
)


class Stack:
    """Both services over one model directory; ends them when left.

    Args:
        options: vLLM's.
        trainer: environment variables of the training server's.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        options: tuple[str, ...] = VLLM,
        trainer: Mapping[str, str] | None = None,
    ):
        self.model, self._folder, self._options = model, folder, options
        self.trainer = trainer or {}
        state = folder / "state"
        self.sidecar = f"unix:{state}/sidecar.sock"
        self._environment = os.environ | {
            "APOLLO_STATE_DIR": str(state),
            "APOLLO_SIDECAR": self.sidecar,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.client = ApolloClient(f"unix:{state}/training.sock")

    def __enter__(self) -> Self:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self._served = ("--model", str(self.model), "--port", str(port), "--host", "127.0.0.1")
        self.url = f"http://127.0.0.1:{port}/v1/completions"
        self.server = self._start("server", SERVER)
        self.vllm = self._start("vllm", ENGINE, *self._served, *self._options)
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error:
            print(f"--- server\n{self._tail('server')}\n--- vllm\n{self._tail('vllm')}")
        self._end()

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env=self._environment | (dict(self.trainer) if name == "server" else PLUGIN),
            stdout=(self._folder / f"{name}.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._attached():
            ended = self.vllm.poll() is not None or self.server.poll() is not None
            if ended or time.monotonic() > deadline:
                raise SystemExit(f"not ready:\n{self._tail('vllm')}\n{self._tail('server')}")
            time.sleep(0.2)

    def _attached(self) -> bool:
        try:
            status = self.client.status()
        except Unavailable:
            return False
        if status.attachment == status_pb2.ATTACHMENT_STATE_REFUSED:
            raise SystemExit(
                f"refused: {status.attachment_detail}\n{self._tail('server')}\n{self._tail('vllm')}"
            )
        return status.attachment == status_pb2.ATTACHMENT_STATE_ATTACHED

    def _tail(self, name: str) -> str:
        return "\n".join(self._log(name).splitlines()[-40:])

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _end(self) -> None:
        for child in (self.server, self.vllm):
            _end(child)

    def restart_server(self) -> float:
        """Ends the training server and starts it over the same state folder; vLLM lives on.

        Returns seconds from its start until it is attached.
        """
        _end(self.server)
        began = time.perf_counter()
        self.server = self._start("server", SERVER)
        self._wait()
        return time.perf_counter() - began

    def restart_vllm(self) -> float:
        """Starts vLLM again; the training server lives on.

        Returns seconds from its start until the training server is attached to it.
        """
        _end(self.vllm)
        began = time.perf_counter()
        self.vllm = self._start("vllm", ENGINE, *self._served, *self._options)
        # Until it has been seen that the old one is lost, its status is the old one's.
        while self._attached():
            time.sleep(0.05)
        self._wait()
        return time.perf_counter() - began

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The token ids that vLLM decodes."""
        return [token for token, _ in self.scored(prompt, count)]

    def scored(self, prompt: list[int], count: int) -> list[tuple[int, float]]:
        """The token ids that vLLM decodes, each with its log-probability. Raises OSError."""
        fields: dict[str, Any] = {"logprobs": 1, "return_tokens_as_token_ids": True}
        body = {"model": str(self.model), "prompt": prompt, "max_tokens": count, "temperature": 0}
        request = urllib.request.Request(
            self.url,
            json.dumps(body | fields | {"ignore_eos": True}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            scores = json.load(answer)["choices"][0]["logprobs"]
        ids = [int(token.removeprefix("token_id:")) for token in scores["tokens"]]
        return list(zip(ids, scores["token_logprobs"], strict=True))

    def server_says(self) -> list[str]:
        """Lines of the training server's log on what it attached and probed."""
        return re.findall(r"attached [^\n]*|no change of [^\n]*", self._log("server"))

    def server_log(self) -> list[str]:
        """Lines of the training server's log."""
        return self._log("server").splitlines()

    def engine_says(self) -> list[str]:
        """Lines of vLLM's log on compilation, CUDA graphs, attention and the sidecar."""
        return sorted({match[0].strip() for match in SAID.finditer(self._log("vllm"))})


def _end(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(20)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

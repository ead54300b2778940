"""Whether requests fail or stall while a thousand steps are taken, in each mode.

    python -m benchmarks.gpu.soak qwen3-4b    # on a GPU; on a CPU a model directory

Streams ask for short answers one after the other, until all requests are answered and all steps
taken; no step waits for them, so that there are as many beside each other as there can be. Says of
each mode how many requests failed, and how long the slowest one took: in `pause_run` requests wait
for the run, which lasts as long as its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from benchmarks import machine
from benchmarks.bench_serving import sample, serving
from benchmarks.gpu.models import OPTIONS, SHAPES, write_shape
from benchmarks.gpu.stack import VLLM

MODES = ("live", "pause_step", "pause_run")
STREAMS, PROMPT, TOKENS = 16, 32, 16
CONTEXT, LEARNED = 256, 64
TOKEN_IDS = range(3, 203)  # that every tokenizer has
ANSWER_SECONDS = 600.0


def main() -> None:
    """Asks, trains, prints and writes the file, each row as it is known."""
    parser = argparse.ArgumentParser(description="Asks for answers beside a thousand steps.")
    parser.add_argument("model", help=f"of {', '.join(sorted(SHAPES))}, or a directory")
    parser.add_argument("--requests", type=int, default=10_000, help="of each mode, at least")
    parser.add_argument("--steps", type=int, default=1_000, help="of each mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = asked.out or machine.result_path(f"soak-{Path(asked.model).name}", device)
    result = {**machine.origin(device), "model": Path(asked.model).name, "streams": STREAMS}
    result["modes"] = {}
    os.environ["APOLLO_SERVING_SHARE"] = "0"
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/dev/shm") as folder:
        model, options = Path(asked.model).absolute(), list[str]()
        if asked.model in SHAPES:
            model = write_shape(asked.model, Path(folder) / "model", seed=1)
            options = [*VLLM, *OPTIONS.get(asked.model, ())]
        with serving(model, Path(folder) / "up", "auto", options) as (client, url):
            for mode in asked.modes:
                ask = partial(_answer, url, str(model))
                row = beside(client, ask, mode, asked.requests, asked.steps)
                result["modes"][mode] = row
                print(mode, row, flush=True)
                machine.write_json(path, result)


def beside(
    client: ApolloClient, ask: Callable[[int], None], mode: str, requests: int, steps: int
) -> dict[str, Any]:
    """A row of one mode."""
    numbers, trained = count(), threading.Event()
    began = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(_asked, ask, numbers, requests, trained) for _ in range(STREAMS)]
        try:
            how: dict[str, Any] = {"epochs": steps, "lr": 1e-7, "min_loss": 0, "coherence": mode}
            *_, last = client.train([sample(CONTEXT, LEARNED, seed=7)], **how)
        finally:
            trained.set()
        took = time.monotonic() - began
        answered = [each for stream in streams for each in stream.result()]
    seconds = sorted(each for each in answered if isinstance(each, float))
    return {
        "state": pb.RunState.Name(last.finished.state),
        "failure": last.finished.failure.message,
        "steps": last.finished.steps_done,
        "seconds": took,
        "requests": len(answered),
        "failed": [each for each in answered if isinstance(each, str)],
        "p50_ms": 1e3 * seconds[len(seconds) // 2],
        "longest_ms": 1e3 * seconds[-1],
    }


def _asked(
    ask: Callable[[int], None], numbers: Iterator[int], requests: int, trained: threading.Event
) -> list[float | str]:
    """Of each request of one stream: its seconds, or why it failed."""
    found = list[float | str]()
    while (number := next(numbers)) < requests or not trained.is_set():
        began = time.monotonic()
        try:
            ask(number)
            found.append(time.monotonic() - began)
        except (OSError, ValueError) as error:
            found.append(repr(error))
    return found


def _answer(url: str, model: str, number: int) -> None:
    """Has vLLM answer one; raises OSError or ValueError where it does not."""
    prompt = [TOKEN_IDS[(number * 7 + place) % len(TOKEN_IDS)] for place in range(PROMPT)]
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
    request = urllib.request.Request(
        url, json.dumps(body | {"temperature": 0}).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        made = json.load(answer)["usage"]["completion_tokens"]
    if made != TOKENS:
        raise ValueError(f"{made} tokens for {TOKENS}")


if __name__ == "__main__":
    main()

"""Whether requests fail or stall while a thousand steps are taken, in each mode.

    python -m benchmarks.gpu.soak qwen3-4b    # on a GPU; on a CPU a model directory

Streams ask for short answers one after the other, until all requests are answered and all steps
taken; no step waits for them, so that there are as many beside each other as there can be. Says of
each mode how many requests failed, and how long the slowest one took: in `pause_run` requests wait
for the run, which lasts as long as its steps.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import torch

from apollo_grpc.v1 import training_pb2 as pb
from benchmarks import machine
from benchmarks.gpu.models import OPTIONS, SHAPES, write_shape
from benchmarks.gpu.stack import VLLM, Stack

MODES = ("live", "pause_step", "pause_run")
STREAMS, PROMPT, TOKENS = 16, 32, 16
CONTEXT, LEARNED = 256, 64
TOKEN_IDS = range(3, 203)  # that every tokenizer has
ON_CPU = ("--enforce-eager",)


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
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/dev/shm") as folder:
        model, options = Path(asked.model).absolute(), ON_CPU
        if asked.model in SHAPES:
            model = write_shape(asked.model, Path(folder) / "model", seed=1)
            options = (*VLLM, *OPTIONS.get(asked.model, ()))
        share = {"APOLLO_SERVING_SHARE": "0"}
        with Stack(model, Path(folder), options, trainer=share) as stack:
            for mode in asked.modes:
                result["modes"][mode] = beside(stack, mode, asked.requests, asked.steps)
                print(mode, result["modes"][mode], flush=True)
                machine.write_json(path, result)


def beside(stack: Stack, mode: str, requests: int, steps: int) -> dict[str, Any]:
    """A row of one mode."""
    numbers, trained = count(), threading.Event()
    began = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(_asked, stack, numbers, requests, trained) for _ in range(STREAMS)]
        try:
            how: dict[str, Any] = {"epochs": steps, "lr": 1e-7, "min_loss": 0, "coherence": mode}
            *_, last = stack.client.train([_sample()], **how)
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


def _sample() -> dict[str, list[int]]:
    draw = random.Random(7)
    lengths = {"context_ids": CONTEXT, "continuation_ids": LEARNED}
    return {name: draw.choices(TOKEN_IDS, k=n) for name, n in lengths.items()}


def _asked(
    stack: Stack, numbers: Iterator[int], requests: int, trained: threading.Event
) -> list[float | str]:
    """Of each request of one stream: its seconds, or why it failed."""
    found = list[float | str]()
    while (number := next(numbers)) < requests or not trained.is_set():
        began = time.monotonic()
        try:
            _answer(stack, number)
            found.append(time.monotonic() - began)
        except (OSError, ValueError) as error:
            found.append(repr(error))
    return found


def _answer(stack: Stack, number: int) -> None:
    prompt = [TOKEN_IDS[(number * 7 + place) % len(TOKEN_IDS)] for place in range(PROMPT)]
    made = len(stack.greedy(prompt, TOKENS))
    if made != TOKENS:
        raise ValueError(f"{made} tokens for {TOKENS}")


if __name__ == "__main__":
    main()

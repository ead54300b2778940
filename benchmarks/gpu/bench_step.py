"""Training steps on a GPU through the product, vLLM beside it, and the same samples in plain code.

    python -m benchmarks.gpu.bench_step qwen3-4b

Writes a model directory of that shape, starts vLLM as it starts by default and the training server,
and trains. A step's time is that between two step events, as the server stamps them. Then both end,
and the same samples are learned by plain transformers with apollo-torch (where it is installed):
all gradients kept, one sample a step, context frozen. Memory is the card's, as its driver tells it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # contenders is a script's
import contenders

from apollo_client import ApolloClient
from benchmarks import machine
from benchmarks.gpu import stack
from benchmarks.gpu.models import SHAPES, VOCABULARY, write_shape
from benchmarks.gpu.stack import Stack

MAX_MODEL_LEN = 6656
# Name: context and continuation tokens, samples a step.
CASES = {
    "1800 + 200": (1800, 200, 1),
    "256 + 64": (256, 64, 1),
    "6000 + 400": (6000, 400, 1),
    "32 samples of 64 + 64": (64, 64, 32),
}
STEPS, WARM_UP = 24, 8


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description="Times training steps beside vLLM.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda")
    result = {**machine.origin(device), "shape": asked.shape, "steps": STEPS - WARM_UP}
    result["versions"]["vllm"] = machine.installed("vllm")
    with tempfile.TemporaryDirectory(prefix="bench-step-", dir="/dev/shm") as folder:
        model = write_shape(asked.shape, Path(folder) / "model", seed=1)
        torch.cuda.empty_cache()
        result["product"] = product(model, Path(folder), asked.cases)
        result["plain"] = plain(model, [c for c in asked.cases if CASES[c][2] == 1])
    path = asked.out or machine.result_path(f"bench_step-{asked.shape}", device)
    machine.write_json(path, result)
    print(json.dumps(result, indent=1))


def product(model: Path, folder: Path, cases: list[str]) -> dict[str, Any]:
    """Through the training server, beside vLLM."""
    at = stack.VLLM.index("--max-model-len") + 1
    options = (*stack.VLLM[:at], str(MAX_MODEL_LEN), *stack.VLLM[at + 1 :])
    with Stack(model, folder, options) as running:
        attached = used_gb()
        client, rows, first = running.client, {}, time.perf_counter()
        for event in client.train(samples(*CASES[cases[0]], seed=99), lr=1e-6):
            if event.HasField("step"):
                first = time.perf_counter() - first
        for case in cases:
            rows[case] = {**steps_of(client, case), "gb_beyond_attached": used_gb() - attached}
            print(case, rows[case], flush=True)
        kernels = [line for line in running.server_log() if "kernels" in line or "graph" in line]
        return {"first_step_seconds": first, "gb_used": attached, "cases": rows, "log": kernels}


def steps_of(client: ApolloClient, case: str) -> dict[str, Any]:
    """A run of one case; milliseconds between step events."""
    context, continuation, count = CASES[case]
    stamps, steps = [], []
    learned = samples(context, continuation, count, seed=7)
    for event in client.train(learned, lr=1e-6, epochs=STEPS, samples_per_step=count):
        if event.HasField("step"):
            stamps.append(event.event_time.ToNanoseconds() / 1e6)
            steps.append(event.step)
        if event.HasField("finished"):
            assert not event.finished.failure.message, event.finished.failure.message
    gaps = [b - a for a, b in pairwise(stamps)]
    warm = gaps[WARM_UP - 1 :]
    return {
        "ms": statistics.median(warm), "ms_min": min(warm), "ms_max": max(warm),
        "ms_at_first": gaps[: WARM_UP - 1],
        "samples_per_second": 1e3 * count / statistics.median(warm),
        "loss_first": steps[0].loss, "loss_last": steps[-1].loss,
        "micro_batches": steps[-1].micro_batches,
    }  # fmt: skip


def plain(model: Path, cases: list[str]) -> dict[str, Any]:
    """The way of the script that the product replaces: the context once, then the rest over it."""
    try:
        contender = contenders.apollo_torch(rank=64)
    except contenders.Unavailable as missing:
        return {"unavailable": str(missing)}
    served = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
    torch.cuda.reset_peak_memory_stats()
    optimizer, before = (
        contender.make(dict(served.named_parameters())),
        torch.cuda.memory_allocated(),
    )
    rows = {}
    for case in cases:
        context, continuation, _ = CASES[case]
        (sample,) = samples(context, continuation, 1, seed=7)
        rows[case] = timed(lambda sample=sample: plain_step(served, optimizer, sample))
        peak = torch.cuda.max_memory_allocated() - before
        rows[case]["gb_beyond_weights"] = peak / 1e9
        print("plain", case, rows[case], flush=True)
    return rows


def plain_step(model: Any, optimizer: Any, sample: dict[str, list[int]]) -> None:
    """One context-frozen step with all gradients."""
    context, continuation = sample["context_ids"], sample["continuation_ids"]
    ids = torch.tensor([context[:-1]], device="cuda")
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    inputs = torch.tensor([[context[-1], *continuation[:-1]]], device="cuda")
    logits = model(inputs, past_key_values=cache, use_cache=True).logits[0]
    targets = torch.tensor(continuation, device="cuda")
    torch.nn.functional.cross_entropy(logits.float(), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step by the clock, the device waited for."""
    times = []
    for number in range(10):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(1e3 * (time.perf_counter() - began))
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}


def samples(context: int, continuation: int, count: int, seed: int) -> list[dict[str, list[int]]]:
    """Seeded samples of token ids."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(length)]

    return [
        {"context_ids": ids(context), "continuation_ids": ids(continuation)} for _ in range(count)
    ]


def used_gb() -> float:
    """Memory of the card in use, by all processes."""
    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(told.stdout.split()[0]) * 2**20 / 1e9


if __name__ == "__main__":
    main()

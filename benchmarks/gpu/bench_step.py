"""Training steps on a GPU through the product, vLLM beside it, and the same samples in plain code.

    python -m benchmarks.gpu.bench_step qwen3-4b

Writes a model directory of that shape, starts vLLM as it starts by default and the training server,
and trains. A step's time is that between two step events, as the server stamps them. Each case but
the first has a training server of its own, started over the kernels that the first one kept, so
that its memory is its own too: the card's, as its driver tells it. At last both end, and the same
samples are learned by plain transformers with apollo-torch (where it is installed): all gradients
kept, one sample a step, context frozen.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from apollo_client import ApolloClient
from apollo_trainer.config import Settings
from apollo_trainer.memory_command import memory_of
from apollo_trainer.training.needs import StepShape
from benchmarks import machine
from benchmarks.gpu import stack
from benchmarks.gpu.models import OPTIONS, SHAPES, VOCABULARY, write_shape
from benchmarks.gpu.plain import plain
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
FULL_SPEED = 1.1  # of the median


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description="Times training steps beside vLLM.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain code")
    parser.add_argument("--saved", action="store_true", help="also a sync and a snapshot")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda")
    asked.out = asked.out or machine.result_path(f"bench_step-{asked.shape}", device)
    result = {**machine.origin(device), "shape": asked.shape, "steps": STEPS - WARM_UP}
    result["versions"]["vllm"] = machine.installed("vllm")
    with tempfile.TemporaryDirectory(prefix="bench-step-", dir="/dev/shm") as folder:
        model = write_shape(asked.shape, Path(folder) / "model", seed=1)
        torch.cuda.empty_cache()
        others = OPTIONS.get(asked.shape, ())
        product(model, Path(folder), asked, others, result)
        if not asked.no_plain:
            alone = [case for case in asked.cases if CASES[case][2] == 1]
            result["plain"] = plain(model, {c: samples(*CASES[c], seed=7)[0] for c in alone})
    machine.write_json(asked.out, result)
    print(json.dumps(result, indent=1))


def product(
    model: Path,
    folder: Path,
    asked: argparse.Namespace,
    others: tuple[str, ...],
    result: dict[str, Any],
) -> None:
    """Through the training server, beside vLLM; what is known is written with each row."""
    options = (*stack.VLLM, "--max-model-len", str(MAX_MODEL_LEN), *others)
    rows: dict[str, Any] = {}
    result["product"] = {"cases": rows}
    with Stack(model, folder, options) as running:
        for number, case in enumerate(asked.cases):
            # Each case's memory is its own; compiled kernels are there from the second on.
            attach = {"attach_seconds": running.restart_server()} if number else {}
            attached, run = used_gb(), taken(running.client, case)
            memory = {
                "gb_attached": attached,
                "gb_beyond_attached": used_gb() - attached,
                "gb_told": told_gb(model, case),
            }
            rows[case] = {**steps_of(run, case), **memory, **attach, **start_of(run)}
            print(case, rows[case], flush=True)
            machine.write_json(asked.out, result)
        words = ("kernels", "graph", " GB", "attention")
        log = [line for line in running.server_log() if any(word in line for word in words)]
        result["product"]["log"] = log
        if asked.saved:
            result["product"] |= saved_in(running.client, model)


def saved_in(client: ApolloClient, model: Path) -> dict[str, Any]:
    """Seconds of a sync and of a snapshot, by the clock of whoever asks for it."""
    gib = sum(each.stat().st_size for each in model.glob("*.safetensors")) / 2**30
    saved: dict[str, Any] = {"model_gib": gib}
    for name, save in (("sync", client.sync), ("snapshot", client.create_snapshot)):
        began = time.perf_counter()
        save()
        seconds = time.perf_counter() - began
        saved[name] = {"seconds": seconds, "seconds_per_gib": seconds / gib}
        print(name, saved[name], flush=True)
    return saved


@dataclass(frozen=True)
class Taken:
    """A run's steps; when Train was called, it began, each step was done, it ended: in ms."""

    called: float
    began: float
    stamps: list[float]
    ended: float
    steps: list[Any]
    failure: str = ""

    @property
    def took(self) -> list[float]:
        """Milliseconds of each step."""
        return [b - a for a, b in pairwise([self.began, *self.stamps])]

    @property
    def warm(self) -> list[float]:
        """Those of the steps that count."""
        return self.took[WARM_UP:]


def taken(client: ApolloClient, case: str, **options: Any) -> Taken:
    """A run of one case, with further options; `samples` takes the place of the case's own."""
    context, continuation, count = CASES[case]
    learned = options.pop("samples", None) or samples(context, continuation, count, seed=7)
    options |= {"lr": 1e-6, "epochs": STEPS, "samples_per_step": count, "min_loss": 0}
    called, began, stamps, steps, failure = 1e3 * time.time(), 0.0, [], [], ""
    for event in client.train(learned, **options):
        stamp = event.event_time.ToNanoseconds() / 1e6
        if event.HasField("started"):
            began = stamp
        if event.HasField("step"):
            stamps.append(stamp)
            steps.append(event.step)
        if event.HasField("finished"):
            failure = event.finished.failure.message
    return Taken(called, began, stamps, stamp, steps, failure)


def steps_of(run: Taken, case: str) -> dict[str, Any]:
    """Milliseconds of a run's steps.

    Passes are captured when their shape comes for the second time: in the second step, or in the
    first where that has several micro-batches. Of a run that failed: why.
    """
    if run.failure:
        return {"failed": run.failure, "steps_taken": len(run.steps)}
    count, warm, took = CASES[case][2], run.warm, run.took
    micro_batches = run.steps[-1].micro_batches
    return {
        "ms": statistics.median(warm), "ms_min": min(warm), "ms_max": max(warm),
        "ms_first": took[0], "ms_capturing": took[1 if micro_batches == 1 else 0],
        "ms_at_first": took[:WARM_UP],
        "samples_per_second": 1e3 * count / statistics.median(warm),
        "loss_first": run.steps[0].loss, "loss_last": run.steps[-1].loss,
        "micro_batches": micro_batches,
    }  # fmt: skip


def start_of(run: Taken) -> dict[str, float]:
    """Seconds from the call of Train to the end of the first step, and of one at full speed."""
    if run.failure:
        return {}
    usual = statistics.median(run.warm)
    done = zip(run.stamps, run.took, strict=True)
    full = next(stamp for stamp, took in done if took <= FULL_SPEED * usual)
    return {
        "first_step_seconds": (run.stamps[0] - run.called) / 1e3,
        "full_speed_seconds": (full - run.called) / 1e3,
        "ms_at_full_speed": usual,
    }


def told_gb(model: Path, case: str) -> float:
    """What is told in advance that a step of this case needs beside weights and state."""
    context, continuation, count = CASES[case]
    shape = StepShape(context, continuation, count)
    return memory_of(model, shape, None, Settings()).step_bytes / 1e9


def samples(context: int, continuation: int, count: int, seed: int) -> list[dict[str, list[int]]]:
    """Seeded samples of token ids."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(length)]

    return [
        {"context_ids": ids(context), "continuation_ids": ids(continuation)} for _ in range(count)
    ]


def used_gb() -> float:
    """Memory of the card in use, by all processes, as its driver tells it."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


if __name__ == "__main__":
    main()

"""What anchors, a teacher and probes cost a step on a GPU, vLLM beside it.

    python -m benchmarks.gpu.bench_objectives qwen3-4b

One stack; each row is a run of the same samples, with one thing more. A row's own kernels and
graphs are made in its first steps, which do not count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from benchmarks import machine
from benchmarks.gpu import stack
from benchmarks.gpu.bench_step import MAX_MODEL_LEN, samples, steps_of, taken
from benchmarks.gpu.models import SHAPES, write_shape
from benchmarks.gpu.stack import Stack

CASE = "1800 + 200"
Options = dict[str, Any]


def anchors(count: int, context: int, continuation: int) -> Options:
    """So many anchors, all of them in each step."""
    return {"anchors": samples(context, continuation, count, seed=8), "anchors_per_step": count}


def taught() -> Options:
    """The same answer, from a teacher that reads another 1800 tokens before it."""
    (sample,) = samples(1800, 200, 1, seed=7)
    (other,) = samples(1800, 1, 1, seed=9)
    learned = sample | {"teacher_context_ids": other["context_ids"] + sample["context_ids"]}
    return {"samples": [learned], "loss": "context_distillation"}


def probed() -> Options:
    """Sixteen questions before the first step, and after the last."""
    return {
        "probes": [
            pb.Probe(
                sample=pb.Sample(
                    tokens=pb.TokenSample(
                        context_ids=each["context_ids"], continuation_ids=each["continuation_ids"]
                    )
                ),
                check=pb.PROBE_CHECK_EXACT,
            )
            for each in samples(32, 16, 16, seed=10)
        ]
    }


ROWS: dict[str, Callable[[], Options]] = {
    "nothing more": dict,
    "14 anchors of 16 + 8": lambda: anchors(14, 16, 8),
    "an anchor of 1800 + 200": lambda: anchors(1, 1800, 200),
    "a teacher that reads 3600": taught,
    "16 probes of 32 + 16": probed,
}


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description="Times what runs have beside their samples.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda")
    result = {**machine.origin(device), "shape": asked.shape, "case": CASE}
    result["versions"]["vllm"] = machine.installed("vllm")
    with tempfile.TemporaryDirectory(prefix="bench-objectives-", dir="/dev/shm") as folder:
        model = write_shape(asked.shape, Path(folder) / "model", seed=1)
        torch.cuda.empty_cache()
        options = (*stack.VLLM, "--max-model-len", str(MAX_MODEL_LEN))
        with Stack(model, Path(folder), options) as running:
            result["rows"] = {name: row(running.client, make()) for name, make in ROWS.items()}
    path = asked.out or machine.result_path(f"bench_objectives-{asked.shape}", device)
    machine.write_json(path, result)
    print(json.dumps(result, indent=1))


def row(client: ApolloClient, options: Options) -> dict[str, Any]:
    """Milliseconds of a step, and seconds before the first one is done and after the last."""
    run = taken(client, CASE, **options)
    found = steps_of(run, CASE)
    if not run.failure:
        found["seconds_to_first_step"] = (run.stamps[0] - run.called) / 1e3
        found["seconds_after_last_step"] = (run.ended - run.stamps[-1]) / 1e3
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()

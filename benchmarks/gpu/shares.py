"""How large a share of a GPU's threads training should have under MPS, and which priority.

    python -m benchmarks.gpu.shares qwen3-4b

One vLLM decodes under one MPS daemon; a training server of each kind is started beside it in
turn. Under MPS the percentage bounds how much of the card a process may use at a time, and a
process of lower priority waits for the blocks of others (NVIDIA, "Multi-Process Service":
CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, CUDA_MPS_CLIENT_PRIORITY).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from apollo_client.command.gpu_sharing import GpuSharing, shared_gpu
from benchmarks import machine
from benchmarks.bench_serving import Load, training
from benchmarks.gpu.models import SHAPES, write_shape
from benchmarks.gpu.stack import VLLM, Stack

# The percentage, and the priority: 1 is below that of others.
KINDS = ((25, 1), (50, 1), (100, 1), (25, 0))
MODES = ("live", "pause_step")


def kind(percent: int, priority: int) -> dict[str, str]:
    """Environment variables of a training server's."""
    return {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent),
        "CUDA_MPS_CLIENT_PRIORITY": str(priority),
    }


def rows_of(stack: Stack, asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens, gaps and steps in each mode, and the steps where nobody decodes."""
    load, rows = Load(stack.url, str(stack.model), asked.streams), dict[str, Any]()
    for mode in MODES:
        with training(stack.client, mode, asked) as steps:
            rows[mode] = load.take(asked.seconds, steps)
    with training(stack.client, "live", asked) as steps:
        time.sleep(1)
        began, before = time.monotonic(), len(steps)
        time.sleep(asked.seconds / 2)
        rows["alone"] = (len(steps) - before) / (time.monotonic() - began)
    return rows


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description="Shares of a GPU under MPS.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--context", type=int, default=1800)
    parser.add_argument("--learned", type=int, default=200)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda")
    path = asked.out or machine.result_path("shares", device)
    result = machine.origin(device) | {"shape": asked.shape, "streams": asked.streams}
    with tempfile.TemporaryDirectory(prefix="shares-", dir="/dev/shm") as folder:
        model = write_shape(asked.shape, Path(folder) / "model", seed=1)
        options = (*VLLM, "--max-model-len", "4096")
        with shared_gpu(GpuSharing.MPS, Path(folder)) as shared:
            os.environ |= shared.both
            with Stack(model, Path(folder), options, trainer=kind(*KINDS[0])) as stack:
                load = Load(stack.url, str(model), asked.streams)
                load.take(asked.seconds)
                for percent, priority in KINDS:
                    stack.trainer = kind(percent, priority)
                    attached = stack.restart_server()
                    row = {"attach_seconds": attached, "idle": load.take(asked.seconds)}
                    row |= rows_of(stack, asked)
                    result[f"{percent} %, priority {priority}"] = row
                    print(percent, priority, row, flush=True)
                    machine.write_json(path, result)


if __name__ == "__main__":
    main()

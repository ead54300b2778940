"""Which part of a GPU steps should run on under MPS while vLLM decodes.

    python -m benchmarks.gpu.shares qwen3-4b

One vLLM decodes under one MPS daemon; a training server of each kind is started beside it in
turn: each a part of the multiprocessors (`--gpu-percent`). Its blocks go behind vLLM's (NVIDIA,
"Multi-Process Service": CUDA_MPS_CLIENT_PRIORITY), as under `apollo up --gpu-sharing mps`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from apollo_client.command.gpu_sharing import BELOW_NORMAL, GpuSharing, shared_gpu
from benchmarks import machine
from benchmarks.bench_serving import WARM_STEPS, Load, training
from benchmarks.gpu.models import SHAPES, write_shape
from benchmarks.gpu.stack import VLLM, Stack

PERCENTS = (25, 35, 50, 100)
MODES = ("live", "pause_step")


def with_part(percent: int) -> dict[str, str]:
    """Environment variables of a training server's."""
    return {"APOLLO_GPU_PERCENT": str(percent), "CUDA_MPS_CLIENT_PRIORITY": BELOW_NORMAL}


def rows_of(stack: Stack, asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens, gaps and steps in each mode, and the steps where nobody decodes."""
    load, rows = Load(stack.url, str(stack.model), asked.streams), dict[str, Any]()
    for mode in asked.modes:
        with training(stack.client, mode, asked) as steps:
            while len(steps) < WARM_STEPS:  # steps of this place are captured
                load.take(1.0)
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
    parser.add_argument("--percents", type=int, nargs="+", default=list(PERCENTS))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
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
            with Stack(model, Path(folder), options, trainer=with_part(100)) as stack:
                load = Load(stack.url, str(model), asked.streams)
                load.take(asked.seconds)
                for percent in asked.percents:
                    stack.trainer = with_part(percent)
                    attached = stack.restart_server()
                    row = {"attach_seconds": attached, "idle": load.take(asked.seconds)}
                    row |= rows_of(stack, asked)
                    result[f"{percent} %"] = row
                    print(percent, row, flush=True)
                    machine.write_json(path, result)


if __name__ == "__main__":
    main()

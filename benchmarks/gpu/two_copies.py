"""The other ways to have vLLM decode with what was just learned: a second copy, or a restart.

    python -m benchmarks.gpu.two_copies qwen3-4b

A second copy of the model learns in plain transformers with apollo-torch, on the same card, and is
handed over by vLLM's own weight transfer over CUDA IPC (vllm/distributed/weight_transfer,
`ipc_engine.py`) after each step. A restart writes the model directory and starts vLLM over it. The
sample is that of `bench_serving`'s row "Train to a changed token". Writes a JSON file under
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import machine
from benchmarks.bench_serving import Load
from benchmarks.decoding import Server
from benchmarks.gpu import plain
from benchmarks.gpu.bench_step import samples, used_gb
from benchmarks.gpu.models import SHAPES, write_shape
from benchmarks.gpu.stack import VLLM

CHANGES = 11
TRANSFER = ("--weight-transfer-config", json.dumps({"backend": "ipc"}))
# vLLM's routes for it are for development, and what they are sent is a pickle.
ALLOWED = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description="Times weight transfers and a restart.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--context", type=int, default=1800)
    parser.add_argument("--learned", type=int, default=200)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda")
    result: dict[str, Any] = {**machine.origin(device), "shape": asked.shape}
    result["sample"] = {"context": asked.context, "learned": asked.learned}
    result["versions"]["vllm"] = machine.installed("vllm")
    with tempfile.TemporaryDirectory(prefix="two-copies-", dir="/dev/shm") as folder:
        model = write_shape(asked.shape, Path(folder) / "model", seed=1)
        torch.cuda.empty_cache()
        result |= measured(model, device, Path(folder), asked)
    path = asked.out or machine.result_path(f"two_copies-{asked.shape}", device)
    machine.write_json(path, result)
    print(json.dumps(result, indent=1))


def measured(
    model: Path, device: torch.device, folder: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds from a step's beginning to a token with it; memory; what a restart takes."""
    began = time.monotonic()
    options = (*VLLM, *TRANSFER)
    with Server(model, device, folder, plugin=False, options=options, others=ALLOWED) as vllm:
        found: dict[str, Any] = {"restart": {"start_seconds": time.monotonic() - began}}
        alone = used_gb()
        copy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
        optimizer = plain.contenders.apollo_torch(rank=64).make(dict(copy.named_parameters()))
        send, load = transfer(vllm.url, copy), Load(f"{vllm.url}/v1/completions", str(model), 1)
        sample = samples(asked.context, asked.learned, 1, seed=7)[0]
        rows = [changed(load, send, lambda: step(copy, optimizer, sample))
                for _ in range(CHANGES)]  # fmt: skip
        found["second copy"] = {
            name: statistics.median(row[name] for row in rows) for name in rows[0]
        }
        found["second copy"]["gb_beside_vllm"] = used_gb() - alone
        began = time.monotonic()
        copy.save_pretrained(folder / "saved")
        found["restart"]["write_seconds"] = time.monotonic() - began
    return found


def step(copy: Any, optimizer: Any, sample: dict[str, list[int]]) -> None:
    """One step of the copy, done when it returns."""
    plain.plain_step(copy, optimizer, sample)
    torch.cuda.synchronize()


def changed(load: Load, send: Callable[[], None], learn: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of the step, of the transfer, and of all until a token is there."""
    began = time.monotonic()
    learn()
    learned = time.monotonic()
    send()
    sent = time.monotonic()
    asyncio.run(load.one_token())
    return {
        "step_ms": 1e3 * (learned - began),
        "transfer_ms": 1e3 * (sent - learned),
        "changed_token_ms": 1e3 * (time.monotonic() - began),
    }


def transfer(url: str, copy: Any) -> Callable[[], None]:
    """What hands the copy's weights to vLLM."""
    base = importlib.import_module("vllm.distributed.weight_transfer.base")
    ipc = importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
    clients = importlib.import_module("vllm.distributed.weight_transfer.clients")
    begun = ipc.IPCTrainerWeightTransferEngine.trainer_init(
        ipc.IPCTrainerInitInfo(rank=0),
        client=clients.HTTPVLLMWeightSyncClient(url),
        source=base.ModuleSource(copy),
    )
    send: Callable[[], None] = begun.send_weights
    return send


if __name__ == "__main__":
    main()

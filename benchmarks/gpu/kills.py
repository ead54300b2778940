"""What else dies when the training server, or vLLM, is killed in the middle of a step.

    python -m benchmarks.gpu.kills qwen3-0.6b --sharing mps --trainers 50 --engines 50

Streams decode and a run trains without a break; then one of the two processes is killed with
SIGKILL at a random instant. Says of each kill of the training server how long vLLM's streams stood
still, whether vLLM answers, and whether it answers the same twice (nothing is written afterwards);
of each kill of vLLM when the run ended and why; and of both how long it took to train again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from apollo_client.command.gpu_sharing import GpuSharing, shared_gpu
from apollo_grpc.errors import ApolloError
from benchmarks import machine
from benchmarks.bench_serving import Load
from benchmarks.gpu.models import OPTIONS, SHAPES, write_shape
from benchmarks.gpu.prove import tokens
from benchmarks.gpu.stack import SMALL, VLLM, Stack

STREAMS, FEW_STEPS = 4, 3
ENDLESS: dict[str, Any] = {
    "epochs": 100_000,
    "lr": 1e-7,
    "min_loss": 0,
    "accept_other_weights": True,
}
BEFORE_SECONDS, AFTER_SECONDS, RANDOM_SECONDS = 0.5, 1.5, 0.25
SAMPLE = {"context_ids": tokens(256, 1), "continuation_ids": tokens(64, 2)}
QUICK = (*SMALL, "--enforce-eager")  # A vLLM starts again for each of its kills.


class Training(threading.Thread):
    """A run without an end, read beside the rest; how it ended."""

    def __init__(self, stack: Stack):
        super().__init__()
        self._client, self.going = stack.client, threading.Event()
        self.ended_at, self.reason = 0.0, ""

    def run(self) -> None:
        """Reads until the run, or its server, has ended."""
        steps = 0
        try:
            for event in self._client.train([SAMPLE], **ENDLESS):
                steps += event.HasField("step")
                if steps == FEW_STEPS:
                    self.going.set()
                if event.HasField("finished"):
                    self.reason = event.finished.failure.reason
        except ApolloError as error:
            self.reason = error.reason
        self.ended_at = time.monotonic()
        self.going.set()


class Decoding(threading.Thread):
    """Streams beside the rest, for some seconds; the longest gap between two tokens."""

    def __init__(self, stack: Stack):
        super().__init__()
        self._load = Load(stack.url, str(stack.model), STREAMS)
        self.row: dict[str, Any] = {}

    def run(self) -> None:
        """Decodes; a row with what vLLM said where it failed."""
        try:
            self.row = self._load.take(BEFORE_SECONDS + RANDOM_SECONDS + AFTER_SECONDS)
        except Exception as error:
            self.row = {"failed": repr(error)}


def amid_steps(stack: Stack, draw: random.Random) -> tuple[Training, Decoding]:
    """Returns at a random instant of a run, while streams decode."""
    training = Training(stack)
    training.start()
    training.going.wait(120)
    if not training.is_alive():
        raise SystemExit(f"no run: {training.reason}\n{stack.server_log()[-20:]}")
    decoding = Decoding(stack)
    decoding.start()
    time.sleep(BEFORE_SECONDS + draw.random() * RANDOM_SECONDS)
    return training, decoding


def kill_trainer(stack: Stack, draw: random.Random) -> dict[str, Any]:
    """One kill of the training server, amid steps and streams."""
    training, decoding = amid_steps(stack, draw)
    os.killpg(stack.server.pid, signal.SIGKILL)
    stack.server.wait()
    began = time.monotonic()
    row: dict[str, Any] = {}
    try:
        stack.scored(SAMPLE["context_ids"], 1)
        row["answers_after_seconds"] = time.monotonic() - began
        decoding.join()
        # The first of a prompt fills the cache, and rounds otherwise than those that use it.
        _, *again = (stack.scored(SAMPLE["context_ids"], 16) for _ in range(3))
        row["same_again"] = again[0] == again[1]
    except OSError as error:
        row["answers"] = repr(error)
    decoding.join()
    row["streams"] = decoding.row.get("failed", "")
    row["longest_gap_ms"] = decoding.row.get("longest_ms")
    row["vllm_lives"] = stack.vllm.poll() is None
    if row["vllm_lives"]:
        row["trains_again_seconds"] = stack.restart_server()
        # It reads on once the server is back, which ends the run.
        training.join()
    return row


def kill_engine(stack: Stack, draw: random.Random) -> dict[str, Any]:
    """One kill of vLLM, all its processes, amid steps and streams."""
    training, decoding = amid_steps(stack, draw)
    os.killpg(stack.vllm.pid, signal.SIGKILL)
    killed = time.monotonic()
    training.join(60)
    decoding.join()
    row = {
        "told_seconds": training.ended_at - killed,
        "reason": training.reason,
        "trainer_lives": stack.server.poll() is None,
    }
    return row | {"trains_again_seconds": stack.restart_vllm()}


def killed(shape: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """All rows of one way of sharing."""
    draw = random.Random(asked.seed)
    model = write_shape(shape, folder / "model", seed=1)
    rows: dict[str, Any] = {"trainer": [], "vllm": []}
    with shared_gpu(asked.sharing, folder) as shared:
        os.environ |= shared.both
        options = (*VLLM, *QUICK, *OPTIONS.get(shape, ()))
        with Stack(model, folder, options, trainer=shared.trainer) as stack:
            for name, kill, count in (
                ("trainer", kill_trainer, asked.trainers),
                ("vllm", kill_engine, asked.engines),
            ):
                for _ in range(count):
                    rows[name].append(kill(stack, draw))
                    print(name, rows[name][-1], flush=True)
                    machine.write_json(asked.out, rows)
    return rows


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of all kills: how many were as they should be."""
    trainers, engines = rows["trainer"], rows["vllm"]
    gaps = [row["longest_gap_ms"] for row in trainers if row["longest_gap_ms"]]
    return {
        "trainer_kills": len(trainers),
        "vllm_lived": sum(row["vllm_lives"] for row in trainers),
        "no_stream_failed": sum(not row["streams"] for row in trainers),
        "same_again": sum(row.get("same_again", False) for row in trainers),
        "longest_gap_ms": max(gaps, default=None),
        "median_gap_ms": statistics.median(gaps) if gaps else None,
        "vllm_kills": len(engines),
        "trainer_lived": sum(row["trainer_lives"] for row in engines),
        "longest_told_seconds": max((row["told_seconds"] for row in engines), default=None),
    }


def main() -> None:
    """Kills, prints and writes the file."""
    parser = argparse.ArgumentParser(description="Kills either process amid training.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--sharing", type=GpuSharing, default=GpuSharing.TIME)
    parser.add_argument("--trainers", type=int, default=50)
    parser.add_argument("--engines", type=int, default=50)
    parser.add_argument("--seed", type=int, default=20_412)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda")
    asked.out = asked.out or machine.result_path(f"kills-{asked.sharing}", device)
    origin = machine.origin(device) | {"shape": asked.shape, "sharing": asked.sharing}
    with tempfile.TemporaryDirectory(prefix="kills-", dir="/dev/shm") as folder:
        rows = killed(asked.shape, Path(folder), asked)
    machine.write_json(asked.out, {**origin, **summary(rows), **rows})
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()

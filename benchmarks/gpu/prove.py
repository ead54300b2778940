"""Proves on a GPU that vLLM's weights are trained where they are.

    python -m benchmarks.gpu.prove qwen3-0.6b

Writes a model directory of that shape, starts vLLM as it starts by default (torch.compile and
CUDA graphs on), maps its weights by CUDA IPC, trains them through the training server with real
Apollo steps, and asks vLLM again, prompt and decode. At last vLLM is killed in the middle of a
run. Needs a GPU, vLLM, and this project installed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.weights.attach import Checks, attach
from apollo_trainer.weights.mapping import map_buffers
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.verify import log_probabilities
from apollo_trainer.weights.written import require_written_is_live
from benchmarks import machine
from benchmarks.gpu.models import OPTIONS, SHAPES, VOCABULARY, write_shape
from benchmarks.gpu.stack import SMALL, VLLM, Stack

SEED = 20412
EPOCHS = 30
LEARNING_RATE = 2e-4
CONTEXT, CONTINUATION = 64, 32
ENDLESS_EPOCHS = 100_000
CHECKS = 6


def tokens(count: int, seed: int) -> list[int]:
    """Seeded token ids."""
    draw = random.Random(seed)
    return [draw.randrange(1, VOCABULARY) for _ in range(count)]


def measure_mapping(stack: Stack) -> dict[str, Any]:
    """Device bytes that opening every buffer takes, beside the context of the process."""
    manifest = Sidecar(stack.sidecar).manifest()
    torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    began = time.perf_counter()
    mappings = map_buffers(manifest.buffers)
    seconds = time.perf_counter() - began
    after, _ = torch.cuda.mem_get_info()
    return {
        "buffers": len(mappings),
        "weight_bytes": sum(mapping.size_bytes for mapping in mappings.values()),
        "map_seconds": round(seconds, 4),
        "extra_device_bytes": free - after,
    }


def compare(stack: Stack, prompts: dict[str, list[int]]) -> dict[str, Any]:
    """Both sides on the same prompts: the largest difference of a token, and mean losses."""
    sidecar = Sidecar(stack.sidecar)
    epoch = sidecar.manifest().epoch
    began = time.perf_counter()
    # A probe is the training server's alone, which holds the engine.
    attachment = attach(sidecar, epoch, checks=Checks(liveness=False))
    found: dict[str, Any] = {"attach_seconds": round(time.perf_counter() - began, 3)}
    found["parameters_mapped"] = len(attachment.parameters())
    found["copied_bytes"] = attachment.memory().copied_bytes
    found["written_check_ms"] = [
        milliseconds(lambda: require_written_is_live(sidecar, attachment, prompts["trained"]))
        for _ in range(CHECKS)
    ]
    for name, prompt in prompts.items():
        engine = torch.tensor(sidecar.score(epoch, prompt))
        ours = log_probabilities(attachment.model, prompt)
        found[name] = {
            "largest_difference": float((ours - engine).abs().max()),
            "mean_nll_engine": float(-engine.mean()),
            "mean_nll_trainer": float(-ours.mean()),
            "mean_nll_of_last_tokens_engine": float(-engine[-CONTINUATION:].mean()),
        }
    return found


def milliseconds(work: Callable[[], None]) -> float:
    """What it takes by the clock."""
    began = time.perf_counter()
    work()
    return round((time.perf_counter() - began) * 1e3, 1)


def train(stack: Stack, sample: dict[str, list[int]]) -> dict[str, Any]:
    """Real Apollo steps through the training server."""
    began = time.perf_counter()
    events = list(stack.client.train([sample], epochs=EPOCHS, lr=LEARNING_RATE, min_loss=0))
    steps = [event.step for event in events if event.HasField("step")]
    finished = events[-1].finished
    if finished.state != pb.RUN_STATE_SUCCEEDED:
        raise SystemExit(f"the run failed: {finished.failure.reason}: {finished.failure.message}")
    return {
        "steps": len(steps),
        "seconds": round(time.perf_counter() - began, 3),
        "loss_first": steps[0].loss,
        "loss_last": steps[-1].loss,
        "forward_ms": median_ms([step.forward_time for step in steps]),
        "backward_ms": median_ms([step.backward_time for step in steps]),
        "optimizer_ms": median_ms([step.optimizer_time for step in steps]),
        "optimizer_ms_first": steps[0].optimizer_time.ToMicroseconds() / 1e3,
        "pause_seconds": finished.pause_time.ToMilliseconds() / 1e3,
    }


def median_ms(durations: list[Any]) -> float:
    """The middle one of the steps' times; the first step's includes compilation."""
    return sorted(duration.ToMicroseconds() / 1e3 for duration in durations)[len(durations) // 2]


def kill_engine_in_mid_run(stack: Stack, sample: dict[str, list[int]]) -> dict[str, Any]:
    """Seconds from kill -9 of every process of vLLM's to the end of the run, and its reason."""
    killed, steps = 0.0, 0
    for event in stack.client.train([sample], epochs=ENDLESS_EPOCHS, lr=1e-6, min_loss=0):
        steps += event.HasField("step")
        if steps == 5 and not killed:
            killed = time.perf_counter()
            os.killpg(stack.vllm.pid, signal.SIGKILL)
        if event.HasField("finished"):
            failure = event.finished.failure
            return {
                "seconds_to_failed": round(time.perf_counter() - killed, 3),
                "reason": failure.reason,
                "steps_after_the_kill": steps - 5,
                "server_lives": stack.server.poll() is None,
                "attachment": stack.client.status().attachment_detail,
            }
    raise SystemExit("the stream ended without `finished`")


def prove(shape: str, folder: Path) -> dict[str, Any]:
    """The whole proof of one shape."""
    began = time.perf_counter()
    model = write_shape(shape, folder / "model", SEED)
    written = time.perf_counter()
    result: dict[str, Any] = {"shape": shape}
    context, continuation = tokens(CONTEXT, 1), tokens(CONTINUATION, 2)
    sample = {"context_ids": context, "continuation_ids": continuation}
    prompts = {"trained": context + continuation, "other": tokens(200, 3)}
    options = (*VLLM, *SMALL, *OPTIONS.get(shape, ()))
    with Stack(model, folder, options) as stack:
        result["seconds_to_ready"] = round(time.perf_counter() - written, 1)
        result["seconds_to_write_model"] = round(written - began, 1)
        result["mapping"] = measure_mapping(stack)
        result["before"] = compare(stack, prompts)
        result["attached"] = stack.server_says()
        result["server_logprob_difference"] = stack.client.status().logprob_difference
        result["greedy_before"] = matching(stack.greedy(context, CONTINUATION), continuation)
        result["training"] = train(stack, sample)
        result["greedy_after"] = matching(stack.greedy(context, CONTINUATION), continuation)
        result["after"] = compare(stack, prompts)
        result["kill"] = kill_engine_in_mid_run(stack, sample)
        result["engine_log"] = stack.engine_says()
    return result


def matching(decoded: list[int], continuation: list[int]) -> str:
    """How many decoded tokens are those that were taught."""
    same = sum(a == b for a, b in zip(decoded, continuation, strict=True))
    return f"{same} of {len(continuation)}"


def main() -> None:
    """Runs the proof and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, help="default: a file in benchmarks/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apollo-prove-") as folder:
        device = torch.device("cuda")
        result = machine.origin(device) | prove(arguments.shape, Path(folder))
    versions = ("vllm", "transformers", "grpcio")
    result["versions"] |= {name: machine.installed(name) for name in versions}
    path = arguments.out or machine.result_path(f"prove-{arguments.shape}", device)
    machine.write_json(path, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""Where a step's time goes on a GPU: by the clock, and by kernel; without vLLM and its memory.

    python -m benchmarks.gpu.profile_step qwen3-4b --context 1800 --learned 200

Weights are random and the model is trained as a library user would, so that nothing but the step is
in the picture: as it is, and then with its passes captured.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.ahead import compile_ahead
from apollo_trainer.training.captured import CapturedPasses, speed_up
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import take_step
from benchmarks.gpu.models import SHAPES, VOCABULARY

STEPS, PROFILED, KERNELS = 9, 3, 32


def main() -> None:
    """Prints the times of each way, and the kernels of the last."""
    parser = argparse.ArgumentParser(description="Profiles training steps on a GPU.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--context", type=int, default=1800)
    parser.add_argument("--learned", type=int, default=200)
    asked = parser.parse_args()
    model, draw = made(asked.shape), random.Random(1)
    before = torch.cuda.memory_reserved()
    optimizer = Apollo(model.named_parameters(), lr=1e-6)
    optimizer.measure = True
    compile_ahead(optimizer)
    ids = [draw.randrange(3, VOCABULARY) for _ in range(asked.context + asked.learned)]
    sample = TokenizedSample(tuple(ids[: asked.context]), tuple(ids[asked.context :]))
    speed_up(model)
    passes = CapturedPasses(model)
    for name, taken in (("as it is", None), ("captured", passes)):
        print(f"{name}: {timed(model, optimizer, sample, taken):.1f} ms at the median", flush=True)
    reserved = (torch.cuda.memory_reserved() - before) / 1e9
    print(f"{reserved:.2f} GB reserved beyond the weights {passes.refusal}")
    for kernel, (ms, count) in kernels(model, optimizer, sample, passes).items():
        print(f"{ms:7.2f} ms {count:6.0f}  {kernel}")


def made(shape: str) -> Any:
    """A model of random weights on the GPU, in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape]()).eval()
    torch.set_default_dtype(torch.float32)
    return model


def timed(
    model: Any, optimizer: Apollo, sample: TokenizedSample, passes: CapturedPasses | None
) -> float:
    """Milliseconds of a step; the first ones compile, allocate and capture."""
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        take_step(model, optimizer, [sample], passes=passes)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[STEPS // 2 :])


def kernels(
    model: Any, optimizer: Apollo, sample: TokenizedSample, passes: CapturedPasses
) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches of a step's kernels, those of most time first."""
    times, counts = Counter[str](), Counter[str]()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            take_step(model, optimizer, [sample], passes=passes)
        torch.cuda.synchronize()
    for event in seen.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:90]] += event.device_time / 1e3 / PROFILED
            counts[event.name[:90]] += 1
    return {name: (ms, counts[name] / PROFILED) for name, ms in times.most_common(KERNELS)}


if __name__ == "__main__":
    main()

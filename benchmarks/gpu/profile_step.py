"""Where a step's time goes on a GPU: by the clock, and by kernel; without vLLM and its memory.

    python -m benchmarks.gpu.profile_step qwen3-4b --context 1800 --learned 200
    python -m benchmarks.gpu.profile_step qwen3-4b --context 64 --learned 64 --samples 32

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
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.delta_rule import choose_delta_rule
from apollo_trainer.training.faster import speed_up
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
    parser.add_argument("--samples", type=int, default=1, help="of one step, all as long")
    parser.add_argument("--layers", type=int, help="so many of the shape's layers")
    asked = parser.parse_args()
    model = made(asked.shape, asked.layers)
    print(choose_delta_rule(model))
    before = torch.cuda.memory_reserved()
    optimizer = Apollo(model.named_parameters(), lr=1e-6)
    optimizer.measure = True
    compile_ahead(optimizer)
    learned = samples(asked.context, asked.learned, asked.samples)
    speed_up(model)
    passes = CapturedPasses(model)
    for name, taken in (("as it is", None), ("captured", passes)):
        print(f"{name}: {timed(model, optimizer, learned, taken):.1f} ms at the median", flush=True)
    reserved = (torch.cuda.memory_reserved() - before) / 1e9
    print(f"{reserved:.2f} GB reserved beyond the weights; {len(passes)} graphs {passes.refusal}")
    for kernel, (ms, count) in kernels(model, optimizer, learned, passes).items():
        print(f"{ms:7.2f} ms {count:6.0f}  {kernel}")


def made(shape: str, layers: int | None) -> Any:
    """A model of random weights on the GPU, in bfloat16."""
    torch.manual_seed(1)
    with torch.device("cuda"):
        config = SHAPES[shape]().get_text_config()
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def samples(context: int, learned: int, count: int) -> list[TokenizedSample]:
    """Seeded samples of so many tokens each."""
    draw = random.Random(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(length))

    return [TokenizedSample(ids(context), ids(learned)) for _ in range(count)]


def timed(
    model: Any, optimizer: Apollo, learned: list[TokenizedSample], passes: CapturedPasses | None
) -> float:
    """Milliseconds of a step; the first ones compile, allocate and capture."""
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        take_step(model, optimizer, learned, passes=passes)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[STEPS // 2 :])


def kernels(
    model: Any, optimizer: Apollo, learned: list[TokenizedSample], passes: CapturedPasses
) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches of a step's kernels, those of most time first."""
    times, counts = Counter[str](), Counter[str]()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            take_step(model, optimizer, learned, passes=passes)
        torch.cuda.synchronize()
    for event in seen.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name[:90]] += event.time_range.elapsed_us() / 1e3 / PROFILED
            counts[event.name[:90]] += 1
    return {name: (ms, counts[name] / PROFILED) for name, ms in times.most_common(KERNELS)}


if __name__ == "__main__":
    main()

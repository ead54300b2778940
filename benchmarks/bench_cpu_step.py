"""Steps of a model on one CPU core: what each phase takes, of the code in this checkout.

    taskset -c 1 python benchmarks/bench_cpu_step.py MODEL_DIRECTORY --context 30 --learned 10

To compare two checkouts run it in both by turns. Writes a JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import installed, origin, result_path, write_json
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from apollo_trainer.optim import Apollo
from apollo_trainer.training.narrow_products import widen_narrow_products
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import take_step

WARM_UP = 2


def main() -> None:
    """Measures, prints and writes the file."""
    parser = argparse.ArgumentParser(description="Times training steps on one CPU core.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, default=30)
    parser.add_argument("--learned", type=int, default=10)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    widen_narrow_products()
    result = {**origin(torch.device("cpu")), **measured(asked)}
    result["versions"]["transformers"] = installed("transformers")
    path = asked.out or result_path("bench_cpu_step", torch.device("cpu"))
    write_json(path, result)
    print(f"{result['seconds']:.3f} s a step; written to {path}")


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step after the first ones, and of its phases at the median."""
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16).eval()
    optimizer = Apollo(model.named_parameters(), lr=1e-5)
    optimizer.measure = True
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(
        3, model.config.vocab_size, (asked.context + asked.learned,), generator=draw
    )
    sample = TokenizedSample(*(tuple(part.tolist()) for part in ids.tensor_split([asked.context])))
    steps, seconds = [], []
    for number in range(WARM_UP + asked.steps):
        began = time.perf_counter()
        step = take_step(model, optimizer, [sample])
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
            steps.append(step)
    return {
        "parameters": optimizer.weights, "context": asked.context, "learned": asked.learned,
        "seconds": statistics.median(seconds), "each": seconds,
        "forward": statistics.median(step.forward_seconds for step in steps),
        "backward": statistics.median(step.backward_seconds for step in steps),
        "optimizer": statistics.median(step.optimizer_seconds for step in steps),
        "loss_first": steps[0].loss, "loss_last": steps[-1].loss,
    }  # fmt: skip


if __name__ == "__main__":
    main()

"""Samples a second in micro-batches over a shared context, beside the same samples one by one.

    python benchmarks/bench_packing.py --threads 1

32 samples of 6 to 12 continuation tokens share a context of 256 tokens, on the small Qwen3 of
examples/byte_model.py in float32. All rows run in turn, round after round, in one process; a ratio
is the median of those within a round. Writes a JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import installed, origin, pick_device, result_path, write_json
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from apollo_trainer.optim import Apollo
from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step
from examples.byte_model import small_qwen3

BASE = "one by one, one update"


def main() -> None:
    """Measures all rows, prints them and writes the file."""
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    model, samples = _model(device), _samples(args.samples, args.context)
    rows = _rows(model, samples)
    seconds = _measure(rows, args.rounds, device)
    result: dict[str, Any] = {
        **origin(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": len(samples),
        "context_tokens": args.context,
        "continuation_tokens": [len(s.continuation_ids) for s in samples],
        "rounds": args.rounds,
        "rows": [_row(name, seconds, len(samples)) for name in rows],
    }
    result["versions"]["transformers"] = installed("transformers")
    path = args.out or result_path("bench_packing", device)
    write_json(path, result)
    for row in result["rows"]:
        print(f"{row['samples_per_second']:8.1f} samples/s  {row['ratio']:5.2f}  {row['name']}")
    print(f"Written to {path}")


def _rows(model: Any, samples: list[TokenizedSample]) -> dict[str, Callable[[], None]]:
    """What is compared; each row learns all samples once."""
    optimizer = Apollo(model.named_parameters(), lr=1e-6)
    optimizer.measure = True

    def one_by_one() -> None:
        for sample in samples:
            loss = continuation_loss(model, sample)
            torch.autograd.backward([loss.weighted / loss.tokens])
        optimizer.step()
        optimizer.zero_grad()

    def step(policy: StepPolicy) -> Callable[[], None]:
        return lambda: _taken(take_step(model, optimizer, samples, policy))

    def each(policy: StepPolicy) -> Callable[[], None]:
        return lambda: [take_step(model, optimizer, [s], policy) for s in samples] and None

    return {
        BASE: one_by_one,
        "one by one, an update a sample": each(StepPolicy()),
        "in one forward, one update": step(StepPolicy()),
        "in micro-batches of 96 tokens, one update": step(StepPolicy(token_budget=96)),
    }


def _taken(result: Any) -> None:
    assert result.skipped_tensors == 0


def _measure(
    rows: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, run in rows.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # The first round compiles and allocates.
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _row(name: str, seconds: dict[str, list[float]], samples: int) -> dict[str, Any]:
    ratios = [base / own for base, own in zip(seconds[BASE], seconds[name], strict=True)]
    return {
        "name": name,
        "seconds": seconds[name],
        "samples_per_second": samples / statistics.median(seconds[name]),
        "ratio": statistics.median(ratios),
    }


def _model(device: torch.device) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_qwen3()).float().to(device).eval()


def _samples(count: int, context_tokens: int) -> list[TokenizedSample]:
    draw = torch.Generator().manual_seed(1)

    def ids(tokens: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 259, (tokens,), generator=draw).tolist())

    context = ids(context_tokens)
    return [TokenizedSample(context, ids(6 + number % 7)) for number in range(count)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--context", type=int, default=256, help="tokens of the shared context")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, help="the JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()

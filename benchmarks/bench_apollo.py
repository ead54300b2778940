"""Times and memory of Apollo beside torch's optimizers and apollo-torch, in one run.

    python benchmarks/bench_apollo.py --device cuda
    python benchmarks/bench_apollo.py --device cpu --threads 2 --only 'rank 64|AdamW'

A GPU steps the shapes of Qwen3-4B in bfloat16, a CPU about 1e8 parameters in bfloat16 and in
float32, all with synthetic gradients: whole ones, or the factors that 200 learned tokens leave.
Writes a JSON file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from contenders import WINDOW, Contender, Unavailable, contenders
from machine import origin, pick_device, result_path, write_json
from measure import (
    Effort,
    Weights,
    copy_bandwidth,
    free,
    give_gradients,
    gradient_bytes,
    make_weights,
    measure_factors,
    measure_steps,
    state_bytes,
)
from report import complete, table
from shapes import TABLES, count

from apollo_trainer.optim import Apollo

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    """Measures the rows that were asked for, prints the table and writes the file."""
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    args.shapes = args.shapes or ("qwen3-4b" if gpu else "qwen3-100m")
    args.dtypes = args.dtypes or (["bf16"] if gpu else ["bf16", "fp32"])
    bandwidth = copy_bandwidth(device, 4.0 if gpu else 0.25)
    free()
    parameters = count(TABLES[args.shapes]())
    rows = [row for dtype in args.dtypes for row in _rows(args, dtype, bandwidth, device)]
    if not rows:
        raise SystemExit(f"No row matches --only {args.only!r}.")
    complete(rows, WINDOW)
    result = {
        **origin(device),
        "shapes": args.shapes,
        "parameters": parameters,
        "copy_bytes_per_second": bandwidth,
        "projection_window": WINDOW,
        "rows": rows,
    }
    path = args.out or result_path("bench_apollo", device)
    write_json(path, result)
    print(f"\n{table(result)}\n\nWritten to {path}")


def _rows(
    args: argparse.Namespace, dtype: str, bandwidth: float, device: torch.device
) -> list[dict[str, Any]]:
    """Measures the rows of one dtype over the same weights and gradients."""
    chosen = [c for c in contenders() if re.search(args.only, f"{c.name} {dtype}", re.I)]
    if not chosen:
        return []
    weights = make_weights(TABLES[args.shapes](), DTYPES[dtype], device)
    parameters = sum(p.numel() for p in weights.values())
    weight_bytes = DTYPES[dtype].itemsize * parameters
    effort = Effort(args.steps, args.warmup, args.seconds)
    rows = []
    for contender in chosen:
        gradients = gradient_bytes(weights, contender.tokens)
        row = {
            "name": contender.name,
            "family": contender.family,
            "rank": contender.rank,
            "dtype": dtype,
            "parameters": parameters,
            "tokens": contender.tokens,
            "gradient_bytes": gradients,
            # The gradients are read twice, the weights are read and written once.
            "floor_ms": 2 * (gradients + weight_bytes) / bandwidth * 1e3,
            **_measured(contender, weights, effort, device),
        }
        print(f"{dtype} {contender.name}: {row.get('skipped') or format(row['ms'], '.2f') + ' ms'}")
        rows.append(row)
        free()
    return rows


def _measured(
    contender: Contender, weights: Weights, effort: Effort, device: torch.device
) -> dict[str, Any]:
    """The figures of one row, or the reason why there are none."""
    try:
        return _measure(contender, weights, effort, device)
    except (NotImplementedError, ValueError, Unavailable, torch.OutOfMemoryError) as error:
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _measure(
    contender: Contender, weights: Weights, effort: Effort, device: torch.device
) -> dict[str, Any]:
    optimizer, renew = contender.make(weights), contender.refresh
    refresh = None if renew is None else lambda: renew(optimizer)
    if contender.tokens:
        row = measure_factors(optimizer, weights, contender.tokens, refresh, effort, device)
    else:
        give_gradients(weights)
        row = measure_steps(optimizer.step, refresh, effort, device)
    row["state_bytes"] = state_bytes(optimizer)
    if isinstance(optimizer, Apollo):
        row["impl"] = optimizer.impl
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=20, help="timed steps a row")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--seconds", type=float, default=20.0, help="bound on a row's timed steps")
    parser.add_argument("--only", default="", help="regular expression; matches name and dtype")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--shapes", choices=sorted(TABLES))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES))
    parser.add_argument("--out", type=Path, help="the JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()

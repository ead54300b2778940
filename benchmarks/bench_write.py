"""The tiles of the write from factors, one after the other: what `optim/cuda/kinds.py` chose from.

    python benchmarks/bench_write.py

Steps the shapes of Qwen3-4B in bfloat16 on a GPU from the factors of 200 learned tokens, with each
tile, and counts the milliseconds that the write alone takes. Whether the written bits are those of
the first tile is told as well: tiles must not change them. Writes no file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from measure import Weights, free, make_factors, make_weights
from shapes import TABLES
from torch.profiler import ProfilerActivity, profile

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.cuda import kinds

TOKENS, WARM, STEPS = 200, 2, 5
# Rows, columns, tokens a product, parts, warps, stages, most registers a thread.
TILES = [
    (64, 64, 32, 2, 4, 4, 80),
    (64, 128, 32, 4, 4, 3, None),
    (64, 128, 32, 4, 4, 3, 128),
    (128, 128, 64, 4, 8, 2, 128),
    (128, 128, 64, 4, 8, 3, 128),
    (128, 128, 32, 4, 8, 4, 128),
    (128, 256, 64, 4, 16, 2, 128),
    (128, 256, 32, 4, 8, 3, None),
]


def main() -> None:
    """Prints a row for each tile."""
    weights = make_weights(TABLES["qwen3-4b"](), torch.bfloat16, torch.device("cuda"))
    first = {name: p.detach().cpu() for name, p in weights.items()}
    wanted: list[int] = []
    for tile in TILES:
        kinds.WRITE_FACTORS = dict(_launch(*tile))
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(first[name])
        try:
            ms = _write_ms(weights)
        except Exception as error:
            print(f"{tile}: {type(error).__name__} {str(error)[:100]}", flush=True)
            continue
        found = _sums(weights)
        wanted = wanted or found
        print(f"{tile}: {ms:.2f} ms, {'same' if found == wanted else 'OTHER'} bits", flush=True)
        free()


def _launch(*tile: int | None) -> Iterator[tuple[str, int]]:
    names = ["BLOCK_ROWS", "BLOCK_COLS", "BLOCK_T", "PARTS", "num_warps", "num_stages"]
    for name, value in zip([*names, "maxnreg"], tile, strict=True):
        if value is not None:
            yield name, value
    yield from (("REPEATS", 1), ("STAGES", 1))


def _write_ms(weights: Weights) -> float:
    optimizer = Apollo(weights.items(), lr=1e-5)
    optimizer.measure = True
    torch.manual_seed(1)
    gradients = make_factors(weights, TOKENS)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.prepare(gradients)
            optimizer.step(gradients=gradients)
        torch.cuda.synchronize()

    steps(WARM)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        steps(STEPS)
    events: Any = profiled.key_averages()
    micros = sum(e.self_device_time_total for e in events if e.key == "write")
    return float(micros / STEPS / 1e3)


def _sums(weights: Weights) -> list[int]:
    """One number for the bits of each parameter."""
    # In pieces: int64 copies of the embedding alone would take 3 GB.
    return [sum(int(piece.to(torch.int64).sum()) for piece in _pieces(p)) for p in weights.values()]


def _pieces(p: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from itertools.chain(p.detach().view(torch.int16).reshape(-1).split(2**26))


if __name__ == "__main__":
    main()

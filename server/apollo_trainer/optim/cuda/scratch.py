"""All the memory that a fused step needs beside weights and state, set aside before it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apollo_trainer.optim.cuda.tables import Sizes, Wave
from apollo_trainer.optim.rounding import RoundingMode

# 32-bit entries that a matrix's two begin after: Triton compiles a kernel once more for whatever
# begins at no multiple of 16 bytes, amid the first step.
_APART = 4
SHARE = 8192  # rows of `changes` that a program sums
_DESCRIPTORS = 2 * 128  # bytes that a program of `project_aligned` describes its tiles with


@dataclass(frozen=True)
class Step:
    """What a step's kernels hand on to each other.

    What waves share one after another is in front; then an entry or two a matrix.
    """

    P: Tensor  # bfloat16
    R: Tensor  # float32, as all to `parts`
    C: Tensor
    squares: Tensor
    factors: Tensor
    parts: Tensor
    totals: Tensor  # three a matrix of which ranks have some of the channels
    flags: Tensor  # int32: not finite, not zero
    slot_flags: Tensor  # int32, one a parameter: skipped
    rates: Tensor  # float32: lr alpha s, and whether it is stepped
    corrections: Tensor  # float32: 1 / (1 - beta ** t) of both moments
    skipped: Tensor  # int64, 0-dim: how many parameters
    changes: Tensor  # float64 [tiles that are written, 2]
    first_change: dict[int, int]  # of a wave, by the number of its first matrix
    not_counted: list[slice]  # rows of `changes` that another rank counts
    sums: Tensor  # float64: of shares of `changes`, and last of all
    descriptors: Tensor  # bytes
    rounding: RoundingMode
    measure: bool

    def of(self, wave: Wave) -> tuple[Tensor, Tensor, Tensor]:
        """Flags, rates and corrections of a wave."""
        first = _APART * wave.first
        part = slice(first, first + 2 * len(wave.matrices))
        return self.flags[part], self.rates[part], self.corrections[part]

    def changes_of(self, wave: Wave) -> Tensor:
        """Where a wave leaves what it changed."""
        return self.changes[self.first_change[wave.first] :] if self.measure else self.changes

    def workspace(self, size: int, alignment: int, stream: int | None) -> Tensor:
        """Memory that Triton asks for at a launch; launches use it one after another."""
        if size <= len(self.descriptors):
            return self.descriptors
        return torch.empty(size, dtype=torch.int8, device=self.flags.device)


def set_aside(
    waves: Sequence[Wave], slots: int, rounding: RoundingMode, measure: bool, device: torch.device
) -> Step:
    """Allocates for the waves of a step over so many parameters."""
    largest = Sizes()
    for wave in waves:
        if wave.kind.rank is not None:
            largest.cover(wave.sizes)
    count = _APART * sum(len(wave.matrices) for wave in waves)
    flags = torch.zeros(count + slots, dtype=torch.int32, device=device)
    first_change, tiles = _first_changes(waves) if measure else ({}, 0)
    not_counted = [
        slice(first_change[wave.first] + first, first_change[wave.first] + first + count)
        for wave in (waves if measure else ())
        for first, count in wave.changes_elsewhere
    ]

    def floats(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    def doubles(rows: int) -> Tensor:
        return torch.empty((rows, 2), dtype=torch.float64, device=device)

    return Step(
        P=torch.empty(largest.p, dtype=torch.bfloat16, device=device),
        R=floats(largest.r),
        C=floats(largest.c),
        squares=floats(largest.channels),
        factors=floats(largest.channels),
        parts=floats(3 * largest.parts),
        totals=floats(3 * max((len(w.matrices) for w in waves if w.kind.sums_channels), default=0)),
        flags=flags[:count],
        slot_flags=flags[count:],
        rates=floats(count),
        corrections=floats(count),
        skipped=torch.empty((), dtype=torch.int64, device=device),
        changes=doubles(tiles),
        first_change=first_change,
        not_counted=not_counted,
        sums=doubles(-(-tiles // SHARE) + 1 if measure else 0),
        descriptors=torch.empty(_descriptors(waves), dtype=torch.int8, device=device),
        rounding=rounding,
        measure=measure,
    )


def _first_changes(waves: Sequence[Wave]) -> tuple[dict[int, int], int]:
    """Where each wave's rows of `changes` begin, and how many there are."""
    first, tiles = dict[int, int](), 0
    for wave in waves:
        first[wave.first] = tiles
        tiles += len(wave.tiles[wave.writes])
    return first, tiles


def _descriptors(waves: Sequence[Wave]) -> int:
    """Bytes of the largest launch."""
    launches = [len(wave.tiles["project"]) for wave in waves if wave.kind.by_descriptor]
    return _DESCRIPTORS * max(launches, default=0)

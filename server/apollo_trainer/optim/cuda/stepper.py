"""The fused step on CUDA: its launches and their order.

The arithmetic is in the kernels beside this file, the algorithm beside the paper in
`reference.py`. Everything here is enqueued; nothing waits for the device, and what depends on the
step (its number, learning rate) is read from device memory, so that a captured CUDA graph can be
replayed.

Sums over tiles go through memory in a fixed order, never through float atomics, so that a step has
the same bits however its launches are grouped.
"""

from __future__ import annotations

import contextvars
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.optim.cuda import tables
from apollo_trainer.optim.cuda.tables import Kind, Sizes, Wave, Work, is_aligned, plan
from apollo_trainer.optim.options import StepSettings
from apollo_trainer.optim.parameters import Slot
from apollo_trainer.optim.projection import normal_quantiles
from apollo_trainer.optim.reference import NORM_FLOOR
from apollo_trainer.optim.rounding import RoundingMode

try:
    import triton
    import triton.language as tl

    from apollo_trainer.optim.cuda import adam, draw, project, scale, write

    _TYPES: dict[torch.dtype, Any] = {
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
    }
except ImportError:
    triton = None

# Triton's own switch: kernels then run in Python, on a CPU's tensors, to be looked into.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
W_DTYPES = (torch.bfloat16, torch.float32)
G_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def fits(slot: Slot, grad: Tensor) -> bool:
    """Whether the kernels take this parameter; the reference path takes all others."""
    p = slot.param
    if triton is None or not (p.is_cuda or INTERPRETED):
        return False
    if p.dtype not in W_DTYPES or grad.dtype not in G_DTYPES:
        return False
    return slot.rank is not None or (p.is_contiguous() and grad.is_contiguous())


@dataclass(frozen=True)
class _Scratch:
    """What the kernels of one wave hand on to each other."""

    P: Tensor  # bfloat16
    R: Tensor  # float32, as all below
    squares: Tensor
    factors: Tensor
    parts: Tensor


@dataclass(frozen=True)
class _Step:
    """What one call of `step` shares among its waves, an entry or two a matrix."""

    flags: Tensor  # int32: not finite, not zero
    slot_flags: Tensor  # int32, one a parameter: skipped
    rates: Tensor  # float32: lr alpha s, and whether it is stepped
    corrections: Tensor  # float32: 1 / (1 - beta ** t) of both moments
    rounding: RoundingMode
    measure: bool

    def of(self, wave: Wave) -> tuple[Tensor, Tensor, Tensor]:
        """Flags, rates and corrections of a wave."""
        part = slice(2 * wave.first, 2 * (wave.first + len(wave.matrices)))
        return self.flags[part], self.rates[part], self.corrections[part]


class FusedStepper:
    """Launches the kernels for the parameters of one device.

    Args:
        mini: one factor a tensor instead of one a channel.
    """

    def __init__(self, device: torch.device, mini: bool):
        self.device, self.mini = device, mini
        self._waves: dict[Any, list[Wave]] = {}
        self._settings: tuple[float, ...] = ()
        self._settings_on_device = torch.zeros(0, dtype=torch.float64, device=device)
        self._number = torch.zeros(1, dtype=torch.int64, device=device)

    def begin(self, number: int, settings: Sequence[StepSettings]) -> None:
        """Fixes a step's number and settings. While a graph is captured, it counts on by itself."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._number.add_(1)
        else:
            self._number.fill_(number)
        flat = tuple(
            value
            for s in settings
            for value in (
                *(s.lr, *s.betas, s.eps, 1.0 - s.lr * s.weight_decay),
                *(s.norm_growth_limit or 0.0, float(s.proj_refresh), 0.0),
            )
        )
        if flat != self._settings:
            self._settings, host = flat, torch.tensor(flat, dtype=torch.float64)
            self._settings_on_device = self._upload(host)

    def step(
        self,
        works: Sequence[Work],
        settings: Sequence[StepSettings],
        rounding: RoundingMode,
        measure: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Steps all parameters given; `rounding` is of 16-bit weights.

        Returns how many tensors were skipped (int64, 0-dim), and, where measured, the sum of
        squares of the stored change and the number of changed elements (float64 [2]).
        """
        key = tuple((id(w.slot), w.grad.dtype, w.grad.stride(), is_aligned(w.grad)) for w in works)
        if key not in self._waves:
            self._waves[key] = plan(works)
        waves = self._waves[key]
        grads = {id(w.slot): w.grad for w in works}
        for wave in waves:
            self._describe(wave, grads, settings)
        step = self._shared(waves, len(works), rounding, measure)
        # A context of its own: the memory that Triton asks for is no setting of the caller's.
        changes = contextvars.copy_context().run(self._launch, waves, step)
        total = torch.stack([c.sum(0) for c in changes]).sum(0) if measure and changes else None
        return step.slot_flags.sum(dtype=torch.int64), total

    def _shared(
        self, waves: list[Wave], slots: int, rounding: RoundingMode, measure: bool
    ) -> _Step:
        count = 2 * sum(len(wave.matrices) for wave in waves)
        flags = torch.zeros(count + slots, dtype=torch.int32, device=self.device)
        rates, corrections = torch.empty((2, count), dtype=torch.float32, device=self.device)
        return _Step(flags[:count], flags[count:], rates, corrections, rounding, measure)

    def _upload(self, host: Tensor) -> Tensor:
        # Pinned, so that the copy is enqueued; the allocator keeps the memory until it was made.
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def _describe(
        self, wave: Wave, grads: dict[int, Tensor], settings: Sequence[StepSettings]
    ) -> None:
        desc = wave.locate(grads, settings)
        if desc is not None:
            wave.desc = self._upload(desc)
        if not wave.tiles:
            wave.tiles = {k: self._upload(v) for k, v in wave.tile_tables().items()}

    def _launch(self, waves: list[Wave], step: _Step) -> list[Tensor]:
        """Launches all waves; returns what each measured."""
        if triton is not None:
            triton.set_allocator(self._workspace)
        changes = [self._adam(wave, step) for wave in waves if wave.kind.rank is None]
        projected = [wave for wave in waves if wave.kind.rank is not None]
        scratch = self._scratch(projected)
        for wave in projected:
            self._project(wave, scratch, step)
            changes.append(self._write(wave, scratch, step))
        return changes

    def _workspace(self, size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=self.device)

    def _scratch(self, waves: list[Wave]) -> _Scratch:
        """Scratch that holds any of the waves."""
        largest = Sizes()
        for wave in waves:
            largest.cover(wave.sizes)
        P = torch.empty(largest.p, dtype=torch.bfloat16, device=self.device)
        R, squares, factors, parts = (
            torch.empty(size, dtype=torch.float32, device=self.device)
            for size in (largest.r, largest.channels, largest.channels, 3 * largest.parts)
        )
        return _Scratch(P, R, squares, factors, parts)

    def _project(self, wave: Wave, scratch: _Scratch, step: _Step) -> None:
        kind, tiles = wave.kind, wave.tiles
        flags, _, corrections = step.of(wave)
        draw.draw_projections[(len(tiles["draw"]),)](
            wave.desc, tiles["draw"], normal_quantiles(self.device), scratch.P, corrections,
            self._number, self._settings_on_device, RANK=kind.rank, RANK_PADDED=kind.padded,
            BLOCK=tables.BLOCK_DRAW, num_warps=tables.DRAW_WARPS,
        )  # fmt: skip
        along_k = 1 if kind.row_channels else 2
        unit = 0 if kind.g_unit == 0 else 1 if kind.g_unit == along_k else 2
        kernel: Any = project.project
        options: dict[str, Any] = {"G_TYPE": _TYPES[kind.g_dtype]}
        if kind.by_descriptor:
            kernel = project.project_aligned
            options = {"LANES": kind.lanes}
        kernel[(len(tiles["project"]),)](
            wave.desc, tiles["project"], scratch.P, scratch.R, scratch.squares, flags,
            RANK_PADDED=kind.padded, ROW_CHANNELS=kind.row_channels, G_UNIT=unit,
            **kind.projection, **options,
        )  # fmt: skip

    def _write(self, wave: Wave, scratch: _Scratch, step: _Step) -> Tensor:
        kind, tiles, settings = wave.kind, wave.tiles, self._settings_on_device
        flags, rates, corrections = step.of(wave)
        changes = self._changes(tiles["write"], step)
        scale.moments[(len(tiles["moments"]),)](
            wave.desc, tiles["moments"], settings, scratch.R, scratch.squares, scratch.factors,
            scratch.parts, flags, corrections, 1.0 / math.sqrt(kind.rank or 1), RANK=kind.rank,
            RANK_PADDED=kind.padded, TILE=kind.projection["BLOCK_N"], MINI=self.mini,
            BLOCK_R=min(tables.BLOCK_R, kind.padded), BLOCK_N=tables.BLOCK_MOMENTS,
            num_warps=tables.MOMENTS_WARPS,
        )  # fmt: skip
        scale.limit[(len(wave.matrices),)](
            wave.desc, settings, scratch.parts, flags, rates, step.slot_flags, NORM_FLOOR,
            MINI=self.mini, BLOCK=256,
        )  # fmt: skip
        write.write[(len(tiles["write"]),)](
            wave.desc, tiles["write"], settings, scratch.factors, rates, self._number, changes,
            W_TYPE=_TYPES[kind.w_dtype], G_TYPE=_TYPES[kind.g_dtype],
            ROW_CHANNELS=kind.row_channels, W_UNIT=kind.w_unit, G_UNIT=kind.g_unit,
            ALIGNED=kind.aligned, MINI=self.mini, STOCHASTIC=step.rounding == "stochastic",
            SPLIT=_splits(kind, step), MEASURE=step.measure, BLOCK_ROWS=tables.BLOCK_ROWS,
            BLOCK_COLS=tables.BLOCK_COLS, REPEATS=tables.REPEATS, STAGES=tables.WRITE_STAGES,
            num_warps=tables.WRITE_WARPS,
        )  # fmt: skip
        return changes

    def _adam(self, wave: Wave, step: _Step) -> Tensor:
        kind, tiles = wave.kind, wave.tiles["elements"]
        flags, _, _ = step.of(wave)
        changes = self._changes(tiles, step)
        types = {"G_TYPE": _TYPES[kind.g_dtype], "BLOCK": tables.BLOCK_ELEMENTS}
        adam.adam_check[(len(tiles),)](wave.desc, tiles, flags, **types)
        adam.adam_write[(len(tiles),)](
            wave.desc, tiles, self._settings_on_device, flags, self._number, changes,
            W_TYPE=_TYPES[kind.w_dtype], STOCHASTIC=step.rounding == "stochastic",
            SPLIT=_splits(kind, step), MEASURE=step.measure, **types,
        )  # fmt: skip
        adam.adam_count[(len(wave.matrices),)](wave.desc, flags, step.slot_flags)
        return changes

    def _changes(self, tiles: Tensor, step: _Step) -> Tensor:
        return torch.empty(
            (len(tiles) if step.measure else 0, 2), dtype=torch.float64, device=self.device
        )


def _splits(kind: Kind, step: _Step) -> bool:
    return step.rounding == "split16" and kind.w_dtype == torch.bfloat16

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.optim.cuda import kinds
from apollo_trainer.optim.cuda.kinds import Kind, Work, layout
from apollo_trainer.optim.cuda.scratch import SHARE, Step, set_aside
from apollo_trainer.optim.cuda.tables import Wave, plan
from apollo_trainer.optim.factored import Gradient, norm_of
from apollo_trainer.optim.options import StepSettings
from apollo_trainer.optim.projection import normal_quantiles
from apollo_trainer.optim.reference import NORM_FLOOR
from apollo_trainer.optim.rounding import RoundingMode
from apollo_trainer.parallel.ranks import ALONE, Ranks

try:
    import triton
    import triton.language as tl

    from apollo_trainer.optim.cuda import (
        adam,
        change,
        draw,
        factors,
        norms,
        over_ranks,
        project,
        scale,
        write,
    )

    _TYPES: dict[torch.dtype, Any] = {
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
    }
except ImportError:
    triton = None

SQUARES_PROGRAMS = 64  # for a matrix at most: as many tiles as 512 tokens have


@dataclass(frozen=True)
class Prepared:
    """What one step of some parameters works with; it is of no use once they were stepped."""

    waves: list[Wave]
    step: Step
    dense: list[Tensor]  # gradients that are no factors, of what counts on this rank


class FusedStepper:
    """Launches the kernels for the parameters of one device.

    Args:
        mini: one factor a tensor instead of one a channel.
        ranks: that divide parameters; all of them give the same ones in the same order, with
            gradients that lie alike: what is launched together is added up together.
    """

    def __init__(self, device: torch.device, mini: bool, ranks: Ranks = ALONE):
        self.device, self.mini, self._ranks = device, mini, ranks
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
            self._settings_on_device = self._upload(torch.tensor(flat, dtype=torch.float64))
            self._settings = flat

    def prepare(
        self,
        works: Sequence[Work],
        settings: Sequence[StepSettings],
        rounding: RoundingMode,
        measure: bool,
    ) -> Prepared:
        """Sets aside all that a step of these parameters needs; `rounding` is of 16-bit weights."""
        key = tuple((id(w.slot), *layout(w.grad)) for w in works)
        if key not in self._waves:
            self._waves[key] = plan(works)
        waves = self._waves[key]
        grads = {id(w.slot): w.grad for w in works}
        for wave in waves:
            self._describe(wave, grads, settings)
        normal_quantiles(self.device)
        step = set_aside(waves, len(works), rounding, measure, self.device)
        counted = [work for work in works if work.slot.region.counted]
        dense = [work.grad for work in counted if isinstance(work.grad, Tensor)]
        return Prepared(waves, step, dense)

    def squares(self, prepared: Prepared) -> Tensor:
        """The sum of squares of all gradients, float64, 0-dim; not finite where one is not."""
        parts = [self._squares(wave).sum() for wave in prepared.waves if wave.kind.factored]
        dense = [norm_of(grad) for grad in prepared.dense]
        if dense:
            parts.append(torch.stack(dense).to(torch.float64).square_().sum())
        total: Tensor = sum(parts, torch.zeros((), dtype=torch.float64, device=self.device))
        return total

    def _squares(self, wave: Wave) -> Tensor:
        kind = wave.kind
        across = -(-wave.most_tokens // kind.gram["BLOCK_T"])
        programs = min(across * across, SQUARES_PROGRAMS)
        out = torch.empty(len(wave.matrices), programs, device=self.device)
        norms.squares[(len(wave.matrices), programs)](
            wave.desc, out, G_TYPE=_TYPES[kind.g_dtype], ALIGNED=kind.aligned, **kind.gram
        )
        if len(wave.counted) < len(wave.matrices):
            out = out[wave.counted]
        return out.sum(dtype=torch.float64)

    def step(self, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
        """Steps what was prepared, once.

        Returns how many tensors were skipped (int64, 0-dim), and, where measured, the sum of
        squares of the stored change and the number of changed elements (float64 [2]).
        """
        waves, step = prepared.waves, prepared.step
        # A context of its own: the memory that Triton asks for is no setting of the caller's.
        contextvars.copy_context().run(self._launch, waves, step)
        return step.skipped, step.sums[-1] if step.measure and waves else None

    def _upload(self, host: Tensor) -> Tensor:
        # Pinned, so that the copy is enqueued; the allocator keeps the memory until it was made.
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def _describe(
        self, wave: Wave, grads: dict[int, Gradient], settings: Sequence[StepSettings]
    ) -> None:
        desc = wave.locate(grads, settings)
        if desc is not None:
            wave.desc = self._upload(desc)
        if not wave.tiles:
            wave.tiles = {k: self._upload(v) for k, v in wave.tile_tables().items()}

    def _launch(self, waves: list[Wave], step: Step) -> None:
        """Launches all waves. Nothing is allocated from here on: the first of them writes."""
        if triton is not None:
            triton.set_allocator(step.workspace)
        for wave in waves:
            if wave.kind.rank is None:
                self._adam(wave, step)
        for wave in waves:
            if wave.kind.rank is not None:
                self._project(wave, step)
                over_ranks.add_projections(wave, step, self._ranks)
                self._write(wave, step)
        change.count[(1,)](step.slot_flags, len(step.slot_flags), step.skipped, BLOCK=512)
        for rows in step.not_counted:
            step.changes[rows].zero_()
        if len(step.changes):
            shares = len(step.sums) - 1
            change.add_up[(shares,)](step.changes, len(step.changes), SHARE, step.sums, BLOCK=512)
            change.add_up[(1,)](step.sums, shares, shares, step.sums[-1], BLOCK=512)

    def _project(self, wave: Wave, step: Step) -> None:
        kind, tiles = wave.kind, wave.tiles
        flags, _, corrections = step.of(wave)
        draw.draw_projections[(len(tiles["draw"]),)](
            wave.desc, tiles["draw"], normal_quantiles(self.device), step.P, corrections,
            self._number, self._settings_on_device, RANK=kind.rank, RANK_PADDED=kind.padded,
            ROW_CHANNELS=kind.row_channels, CUT=kind.cut, BLOCK=kinds.BLOCK_DRAW,
            num_warps=kinds.DRAW_WARPS,
        )  # fmt: skip
        if kind.factored:
            self._project_factors(wave, step, flags)
            return
        along_k = 1 if kind.row_channels else 2
        unit = 0 if kind.g_unit == 0 else 1 if kind.g_unit == along_k else 2
        kernel: Any = project.project
        options: dict[str, Any] = {"G_TYPE": _TYPES[kind.g_dtype]}
        if kind.by_descriptor:
            kernel = project.project_aligned
            options = {"LANES": kind.lanes}
        kernel[(len(tiles["project"]),)](
            wave.desc, tiles["project"], step.P, step.R, step.squares, flags,
            RANK_PADDED=kind.padded, ROW_CHANNELS=kind.row_channels, G_UNIT=unit,
            **kind.projection, **options,
        )  # fmt: skip

    def _project_factors(self, wave: Wave, step: Step, flags: Tensor) -> None:
        kind = wave.kind
        options = {
            "RANK_PADDED": kind.padded, "ROW_CHANNELS": kind.row_channels,
            "G_TYPE": _TYPES[kind.g_dtype], "ALIGNED": kind.aligned, "BLOCK_R": kind.c_rows,
        }  # fmt: skip
        for portion in wave.portions:
            factors.gram[(portion.matrices, portion.programs)](
                wave.desc, step.P, step.C, portion.first, **options, **kind.gram
            )
            factors.project_factors[(portion.tiles,)](
                wave.desc, wave.tiles["project"], step.C, step.R, step.squares, flags,
                portion.first_tile, **options, **kind.projection,
            )  # fmt: skip

    def _limit(self, wave: Wave, step: Step) -> None:
        flags, rates, _ = step.of(wave)
        parts, several = step.parts, wave.kind.sums_channels
        if several:
            parts = over_ranks.add_parts(wave, step, self._ranks)
        scale.limit[(len(wave.matrices),)](
            wave.desc, self._settings_on_device, parts, flags, rates, step.slot_flags, NORM_FLOOR,
            MINI=self.mini, TOTALS=several, BLOCK=256,
        )  # fmt: skip

    def _write(self, wave: Wave, step: Step) -> None:
        kind, tiles, settings = wave.kind, wave.tiles, self._settings_on_device
        flags, rates, corrections = step.of(wave)
        scale.moments[(len(tiles["moments"]),)](
            wave.desc, tiles["moments"], settings, step.R, step.squares, step.factors,
            step.parts, flags, corrections, 1.0 / math.sqrt(kind.rank or 1), RANK=kind.rank,
            RANK_PADDED=kind.padded, TILE=kind.projection["BLOCK_N"], MINI=self.mini,
            ROW_CHANNELS=kind.row_channels, BLOCK_R=min(kinds.BLOCK_R, kind.padded),
            BLOCK_N=kinds.BLOCK_MOMENTS, num_warps=kinds.MOMENTS_WARPS,
        )  # fmt: skip
        self._limit(wave, step)
        write.write[(len(tiles["write"]),)](
            wave.desc, tiles["write"], settings, step.factors, rates, self._number,
            step.changes_of(wave), W_TYPE=_TYPES[kind.w_dtype], G_TYPE=_TYPES[kind.g_dtype],
            ROW_CHANNELS=kind.row_channels, W_UNIT=kind.w_unit, G_UNIT=kind.g_unit,
            ALIGNED=kind.aligned, FACTORED=kind.factored, CUT=kind.cut, MINI=self.mini,
            STOCHASTIC=step.rounding == "stochastic", SPLIT=_splits(kind, step),
            MEASURE=step.measure, **kind.writing,
        )  # fmt: skip

    def _adam(self, wave: Wave, step: Step) -> None:
        kind, tiles = wave.kind, wave.tiles["elements"]
        flags, _, _ = step.of(wave)
        types = {"G_TYPE": _TYPES[kind.g_dtype], "BLOCK": kinds.BLOCK_ELEMENTS}
        adam.adam_check[(len(tiles),)](wave.desc, tiles, flags, **types)
        if kind.cut:
            self._ranks.largest(flags)
        adam.adam_write[(len(tiles),)](
            wave.desc, tiles, self._settings_on_device, flags, self._number,
            step.changes_of(wave), W_TYPE=_TYPES[kind.w_dtype],
            STOCHASTIC=step.rounding == "stochastic", SPLIT=_splits(kind, step),
            MEASURE=step.measure, CUT=kind.cut, **types,
        )  # fmt: skip
        adam.adam_count[(len(wave.matrices),)](wave.desc, flags, step.slot_flags)


def _splits(kind: Kind, step: Step) -> bool:
    return step.rounding == "split16" and kind.w_dtype == torch.bfloat16

"""What a fused step is launched over: matrices sorted into waves, and the tables that tell where
they lie.

A launch works through a table: row `i` of `tiles` (int32) names a matrix and a tile of it, row `m`
of `desc` (int64, `columns.py`) says where that matrix lies. Many small matrices are one launch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor

from apollo_trainer.optim.cuda.kinds import (
    BLOCK_DRAW,
    BLOCK_ELEMENTS,
    BLOCK_MOMENTS,
    Kind,
    Work,
    kind_of,
)
from apollo_trainer.optim.cuda.rows import TOKENS, Matrix, kept_columns, moving_columns
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.options import StepSettings

# Scratch of one wave of matrices: their R must not need memory in proportion to the model. Smaller
# waves leave the device idle between their launches.
WAVE_BYTES = 512 * 2**20
# Of the products of a wave's factors: those of 2000 tokens take 16 MB a matrix.
PORTION_BYTES = 128 * 2**20
# Programs that share the tiles of a matrix's products. Only the device knows an expert's tokens:
# one that has none costs as many programs.
MOST_PROGRAMS = 32


@dataclass
class Sizes:
    """Elements of each piece of scratch; while a table is filled, where the next matrix begins."""

    p: int = 0
    r: int = 0
    channels: int = 0
    parts: int = 0
    c: int = 0

    def take(self, kind: Kind, matrix: Matrix) -> tuple[int, int, int, int, int]:
        """Offsets of P, R, the channels, the parts, and how many parts there are."""
        count = -(-matrix.n // BLOCK_MOMENTS)
        taken = (self.p, self.r, self.channels, self.parts, count)
        # A multiple of 8 elements keeps the next P aligned for vector loads.
        self.p += -(-kind.padded * matrix.k // 8) * 8
        self.r += kind.projected(matrix.n)
        self.channels += matrix.n
        self.parts += count
        return taken

    def cover(self, other: Sizes) -> None:
        """Grows to hold the other as well."""
        for name, size in vars(other).items():
            setattr(self, name, max(getattr(self, name), size))


@dataclass
class Portion:
    """Matrices of a wave whose products are in scratch at the same time."""

    first: int  # of its matrices within the wave
    first_tile: int  # of `project`
    matrices: int = 0
    tiles: int = 0
    programs: int = 1  # for each matrix's products
    size: int = 0  # elements of C


@dataclass
class Wave:
    """Matrices of one kind that are launched together, and their tables on the device."""

    kind: Kind
    first: int  # number of its first matrix within the step
    matrices: list[Matrix] = field(default_factory=list)
    sizes: Sizes = field(default_factory=Sizes)
    portions: list[Portion] = field(default_factory=list)
    most_tokens: int = 0  # of its factors
    kept: tuple[object, ...] = ()  # what `rows` was made of
    given: tuple[object, ...] = ()  # of which gradients `desc` tells
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    groups: list[list[Matrix]] = field(default_factory=list)  # by parameter
    desc: Tensor | None = None
    tiles: dict[str, Tensor] = field(default_factory=dict)

    def locate(
        self, grads: Mapping[int, Gradient], settings: Sequence[StepSettings]
    ) -> Tensor | None:
        """Returns a new `desc`, on the CPU, where there is none or a tensor lies elsewhere."""
        if not self.groups:
            self.groups = [list(group) for _, group in groupby(self.matrices, lambda m: id(m.slot))]
        heads = [group[0] for group in self.groups]
        kept = tuple(
            (m.slot.param.data_ptr(), m.state["m"].data_ptr(), self._alpha(m, settings))
            for m in heads
        )
        given = tuple(moving_columns(m.slot, grads[id(m.slot)]) for m in heads)
        if self.desc is not None and (kept, given) == (self.kept, self.given):
            return None
        # Where what follows fails, or the upload, the next step must not find an earlier one's.
        self.desc = None
        if kept != self.kept:
            self._keep(settings)
        self.kept, self.given = kept, given
        return torch.cat((self.rows, self._moving(given)), 1)

    def _alpha(self, m: Matrix, settings: Sequence[StepSettings]) -> float:
        rank = self.kind.rank
        return settings[m.slot.group].alpha(min(m.slot.root[-2:]), rank) if rank else 1.0

    def _keep(self, settings: Sequence[StepSettings]) -> None:
        """Fills the columns that gradients do not change."""
        self.sizes = Sizes()
        rows = [
            kept_columns(m, self._alpha(m, settings), self.sizes.take(self.kind, m))
            for m in self.matrices
        ]
        self.rows = torch.tensor(rows, dtype=torch.int64)

    def _moving(self, given: tuple[tuple[int, ...], ...]) -> Tensor:
        """The columns that gradients change."""
        offsets = [0] * len(given)
        if self.kind.factored:
            offsets = self._divide([where[TOKENS] for where in given], [w[-1] for w in given])
        table = [(*where, offset) for where, offset in zip(given, offsets, strict=True)]
        counts = torch.tensor([len(group) for group in self.groups])
        columns = torch.tensor(table, dtype=torch.int64).repeat_interleave(counts, 0)
        skip, moving = columns[:, 0], columns[:, 1:]
        moving[:, 0] += skip * self.rows[:, -1]
        return moving

    def _divide(self, tokens: Sequence[int], widths: Sequence[int]) -> list[int]:
        """Divides the wave into portions; returns where each parameter's products begin in one."""
        self.portions, self.sizes.c, self.most_tokens = [], 0, max(tokens)
        offsets, first, tile, block_n = [], 0, 0, self.kind.projection["BLOCK_N"]
        for group, count, width in zip(self.groups, tokens, widths, strict=True):
            need = self.kind.products(count, width)
            if not self.portions or 4 * (self.portions[-1].size + need) > PORTION_BYTES:
                self.portions.append(Portion(first, tile))
            portion, tiles = self.portions[-1], len(group) * -(-group[0].n // block_n)
            offsets.append(portion.size)
            portion.matrices += len(group)
            portion.tiles += tiles
            portion.programs = max(portion.programs, self.kind.product_tiles(count))
            portion.programs = min(portion.programs, MOST_PROGRAMS)
            portion.size += need
            first, tile = first + len(group), tile + tiles
            self.sizes.c = max(self.sizes.c, portion.size)
        return offsets

    @cached_property
    def counted(self) -> list[int]:
        """Which of its matrices count on this rank."""
        return [n for n, matrix in enumerate(self.matrices) if matrix.slot.region.counted]

    @cached_property
    def projections_elsewhere(self) -> list[tuple[int, int, int, int]]:
        """Of what other ranks count, where it begins in R and among the channels, and its sizes."""
        sizes, found = Sizes(), []
        for m in self.matrices:
            _, r, channels, _, _ = sizes.take(self.kind, m)
            if not m.slot.region.counted:
                found.append((r, self.kind.projected(m.n), channels, m.n))
        return found

    @cached_property
    def changes_elsewhere(self) -> list[tuple[int, int]]:
        """Of what other ranks count, the first tile that is written, and how many they are."""
        counts = dict(self.tile_counts())[self.writes]
        firsts = accumulate(counts, initial=0)
        each = zip(self.matrices, firsts, counts, strict=False)
        return [(first, count) for m, first, count in each if not m.slot.region.counted]

    @property
    def writes(self) -> str:
        """Which tiles the weights are written by."""
        return "elements" if self.kind.rank is None else "write"

    def tile_counts(self) -> Iterator[tuple[str, list[int]]]:
        """How many tiles each matrix has for each kernel."""
        if self.kind.rank is None:
            yield "elements", [-(-m.cols // BLOCK_ELEMENTS) for m in self.matrices]
            return
        kind, writing = self.kind, self.kind.writing
        rows, cols = writing["BLOCK_ROWS"] * writing["REPEATS"], writing["BLOCK_COLS"]
        yield "draw", [-(-kind.padded * m.k // BLOCK_DRAW) for m in self.matrices]
        yield "project", [-(-m.n // kind.projection["BLOCK_N"]) for m in self.matrices]
        yield "moments", [-(-m.n // BLOCK_MOMENTS) for m in self.matrices]
        yield "write", [-(-m.rows // rows) * -(-m.cols // cols) for m in self.matrices]

    def tile_tables(self) -> dict[str, Tensor]:
        """Tables of (matrix, tile), int32 [tiles, 2], on the CPU, for each kernel."""
        return {name: _table(counts) for name, counts in self.tile_counts()}


def plan(works: Sequence[Work]) -> list[Wave]:
    """Sorts parameters into kinds, and each kind into waves of bounded scratch."""
    kinds: dict[Kind, list[Matrix]] = defaultdict(list)
    for number, work in enumerate(works):
        kinds[kind_of(work)] += _matrices(work, number)
    waves: list[Wave] = []
    first = 0
    for kind, matrices in kinds.items():
        room = 0
        for matrix in matrices:
            # Of the whole, so that all ranks divide their matrices alike.
            need = 4 * kind.projected(max(matrix.slot.root[-2:])) if kind.rank else 0
            if not waves or waves[-1].kind != kind or room + need > WAVE_BYTES:
                waves.append(Wave(kind, first))
                room = 0
            waves[-1].matrices.append(matrix)
            room += need
            first += 1
    return waves


def _matrices(work: Work, number: int) -> list[Matrix]:
    slot, state, p = work.slot, work.state, work.slot.param
    if slot.rank is None:
        return [Matrix(slot, state, 0, number, 1, p.numel())] if p.numel() else []
    rows, cols = p.shape[-2:]
    return [Matrix(slot, state, e, number, rows, cols) for e in range(p[..., 0, 0].numel())]


def _table(counts: list[int]) -> Tensor:
    per_matrix = torch.tensor(counts, dtype=torch.int64)
    matrix = torch.repeat_interleave(torch.arange(len(counts)), per_matrix)
    first = torch.repeat_interleave(per_matrix.cumsum(0) - per_matrix, per_matrix)
    return torch.stack((matrix, torch.arange(len(matrix)) - first), 1).to(torch.int32)

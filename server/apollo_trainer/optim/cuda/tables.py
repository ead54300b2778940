"""What a fused step is launched over: matrices sorted into waves, and the tables that tell where
they lie.

A launch works through a table: row `i` of `tiles` (int32) names a matrix and a tile of it, row `m`
of `desc` (int64, `columns.py`) says where that matrix lies. Many small matrices are one launch.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apollo_trainer.optim.options import StepSettings
from apollo_trainer.optim.parameters import Slot

# Scratch of one wave of matrices: their R must not need memory in proportion to the model. Smaller
# waves leave the device idle between their launches.
WAVE_BYTES = 512 * 2**20
# Tiles and launches that were fastest on an H200; docs/LOG.md tells what else was tried.
BLOCK_DRAW, DRAW_WARPS = 16384, 16
BLOCK_ELEMENTS = 1024
BLOCK_MOMENTS, BLOCK_R, MOMENTS_WARPS = 64, 16, 4
BLOCK_ROWS, BLOCK_COLS, REPEATS, WRITE_WARPS, WRITE_STAGES = 16, 128, 8, 2, 2
PROJECT = {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
PROJECT_WIDE = {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
PROJECT_ANY = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


@dataclass(frozen=True)
class Work:
    """One parameter in one fused step."""

    slot: Slot
    grad: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """What a launch is compiled for; parameters of one kind share launches.

    `*_unit`: 1 where the elements of a row are neighbours, 2 those of a column, 0 neither.
    """

    w_dtype: torch.dtype
    g_dtype: torch.dtype
    rank: int | None
    row_channels: bool = True
    w_unit: int = 1
    g_unit: int = 1
    aligned: bool = False

    @property
    def padded(self) -> int:
        """Rows of P that tensor cores want: a power of two from 16 on."""
        return max(16, 1 << ((self.rank or 0) - 1).bit_length())

    @property
    def by_descriptor(self) -> bool:
        """Whether `project_aligned` takes it. A box of the copy engine has at most 256 rows."""
        return self.aligned and self.g_dtype == torch.bfloat16 and self.padded <= 256

    @property
    def projection(self) -> dict[str, int]:
        """Tile and launch of the projection."""
        if not self.by_descriptor:
            return PROJECT_ANY
        return PROJECT_WIDE if self.padded > 64 else PROJECT

    @property
    def lanes(self) -> int:
        """Partial sums of a channel's squares that the threads of a program keep."""
        return min(2 * self.projection["num_warps"], self.projection["BLOCK_K"])

    def projected(self, n: int) -> int:
        """Elements of R for n channels; R is kept in whole tiles."""
        tile = self.projection["BLOCK_N"]
        return self.padded * tile * -(-n // tile) if self.rank is not None else 0


@dataclass
class Matrix:
    """A matrix, or a tensor that is not projected, as a row of `desc`."""

    slot: Slot
    state: dict[str, Tensor]
    index: int  # within a stack
    slot_number: int
    rows: int
    cols: int

    @property
    def n(self) -> int:
        """The larger side: the number of channels."""
        return max(self.rows, self.cols)

    @property
    def k(self) -> int:
        """The smaller side."""
        return min(self.rows, self.cols)


@dataclass
class Sizes:
    """Elements of each piece of scratch; while a table is filled, where the next matrix begins."""

    p: int = 0
    r: int = 0
    channels: int = 0
    parts: int = 0

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
class Wave:
    """Matrices of one kind that are launched together, and their tables on the device."""

    kind: Kind
    first: int  # number of its first matrix within the step
    matrices: list[Matrix] = field(default_factory=list)
    sizes: Sizes = field(default_factory=Sizes)
    located: tuple[tuple[int, ...], tuple[float, ...]] = ((), ())
    desc: Tensor | None = None
    tiles: dict[str, Tensor] = field(default_factory=dict)

    def locate(
        self, grads: Mapping[int, Tensor], settings: Sequence[StepSettings]
    ) -> Tensor | None:
        """Returns a new `desc`, on the CPU, where a tensor lies elsewhere than in the last step."""
        rank = self.kind.rank
        pointers = tuple(
            tensor.data_ptr()
            for m in self.matrices
            for tensor in (grads[id(m.slot)], m.slot.param, m.state["m"])
        )
        alphas = tuple(
            settings[m.slot.group].alpha(m.k, rank) if rank is not None else 1.0
            for m in self.matrices
        )
        if self.located == (pointers, alphas):
            return None
        self.located, self.sizes = (pointers, alphas), Sizes()
        rows = [
            _row(m, grads[id(m.slot)], alpha, self.sizes.take(self.kind, m))
            for m, alpha in zip(self.matrices, alphas, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64)

    def tile_tables(self) -> dict[str, Tensor]:
        """Tables of (matrix, tile), int32 [tiles, 2], on the CPU, for each kernel."""
        if self.kind.rank is None:
            return {"elements": _table([-(-m.cols // BLOCK_ELEMENTS) for m in self.matrices])}
        block_n, padded = self.kind.projection["BLOCK_N"], self.kind.padded
        block_rows = BLOCK_ROWS * REPEATS
        counts = {
            "draw": [-(-padded * m.k // BLOCK_DRAW) for m in self.matrices],
            "project": [-(-m.n // block_n) for m in self.matrices],
            "moments": [-(-m.n // BLOCK_MOMENTS) for m in self.matrices],
            "write": [-(-m.rows // block_rows) * -(-m.cols // BLOCK_COLS) for m in self.matrices],
        }
        return {name: _table(count) for name, count in counts.items()}


def plan(works: Sequence[Work]) -> list[Wave]:
    """Sorts parameters into kinds, and each kind into waves of bounded scratch."""
    kinds: dict[Kind, list[Matrix]] = defaultdict(list)
    for number, work in enumerate(works):
        kinds[_kind(work)] += _matrices(work, number)
    waves: list[Wave] = []
    first = 0
    for kind, matrices in kinds.items():
        room = 0
        for matrix in matrices:
            need = 4 * kind.projected(matrix.n)
            if not waves or waves[-1].kind != kind or room + need > WAVE_BYTES:
                waves.append(Wave(kind, first))
                room = 0
            waves[-1].matrices.append(matrix)
            room += need
            first += 1
    return waves


def is_aligned(t: Tensor) -> bool:
    """Whether vectors of eight elements begin at every eighth one of every row."""
    if t.ndim < 2:
        return False
    sizes = (*t.shape[-2:], *t.stride()[:-1])
    return t.data_ptr() % 16 == 0 and all(size % 8 == 0 for size in sizes)


def _matrices(work: Work, number: int) -> list[Matrix]:
    slot, state, p = work.slot, work.state, work.slot.param
    if slot.rank is None:
        return [Matrix(slot, state, 0, number, 1, p.numel())] if p.numel() else []
    rows, cols = p.shape[-2:]
    return [Matrix(slot, state, e, number, rows, cols) for e in range(p[..., 0, 0].numel())]


def _kind(work: Work) -> Kind:
    p, g, rank = work.slot.param, work.grad, work.slot.rank
    if rank is None:
        return Kind(p.dtype, g.dtype, None)
    w_unit, g_unit = (_unit(t) for t in (p, g))
    aligned = w_unit == g_unit == 1 and all(is_aligned(t) for t in (p, g))
    return Kind(p.dtype, g.dtype, rank, p.shape[-2] >= p.shape[-1], w_unit, g_unit, aligned)


def _unit(t: Tensor) -> int:
    return 1 if t.stride(-1) == 1 else 2 if t.stride(-2) == 1 else 0


def _row(matrix: Matrix, grad: Tensor, alpha: float, offsets: tuple[int, ...]) -> list[int]:
    """A row of `desc`, its entries in the order of `columns.py`."""
    slot, state = matrix.slot, matrix.state
    p, e = slot.param, matrix.index
    stacked = slot.rank is not None and p.ndim == 3

    def at(t: Tensor | None) -> int:
        if t is None:
            return 0
        skip = e * t.stride(0) if stacked else 0
        return t.data_ptr() + skip * t.element_size()

    strides = (*p.stride()[-2:], *grad.stride()[-2:]) if slot.rank is not None else (0, 1, 0, 1)
    first = e * matrix.rows * matrix.cols
    return [
        *(at(p), at(grad), at(state["m"]), at(state["v"]), at(state.get("low"))),
        *(at(state.get("norm")), at(state["step"]), matrix.rows, matrix.cols, *strides, first),
        *(*slot.projection_key, *slot.rounding_key, *offsets),
        *(matrix.slot_number, int(stacked), slot.group, _bits(alpha)),
    ]


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _table(counts: list[int]) -> Tensor:
    per_matrix = torch.tensor(counts, dtype=torch.int64)
    matrix = torch.repeat_interleave(torch.arange(len(counts)), per_matrix)
    first = torch.repeat_interleave(per_matrix.cumsum(0) - per_matrix, per_matrix)
    return torch.stack((matrix, torch.arange(len(matrix)) - first), 1).to(torch.int32)

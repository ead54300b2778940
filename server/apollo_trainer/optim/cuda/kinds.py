"""What a launch is compiled for, and the tiles that are the fastest for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from apollo_trainer.optim.factored import Factored, Gradient
from apollo_trainer.optim.parameters import Slot, shifts_of
from apollo_trainer.parallel.ranks import Ranks

# Triton's own switch: kernels then run in Python, on a CPU's tensors, to be looked into.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None
W_DTYPES = (torch.bfloat16, torch.float32)
G_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Tiles and launches that were fastest on an H200; docs/LOG.md tells what else was tried.
BLOCK_DRAW, DRAW_WARPS = 16384, 16
BLOCK_ELEMENTS = 1024
BLOCK_MOMENTS, BLOCK_R, MOMENTS_WARPS = 64, 16, 4
PROJECT = {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
PROJECT_WIDE = {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
PROJECT_ANY = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
WRITE = {
    "BLOCK_ROWS": 16, "BLOCK_COLS": 128, "BLOCK_T": 0, "REPEATS": 8, "STAGES": 2, "PARTS": 1,
    "num_warps": 2,
}  # fmt: skip
# Of factors, for bfloat16 on tensor cores and for float32 beside them; of these, the tiles of the
# write and of the squares were measured. BLOCK_T counts tokens.
GRAM = {"BLOCK_T": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
GRAM_ANY = {"BLOCK_T": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
FACTORS = {"BLOCK_N": 128, "BLOCK_T": 64, "num_warps": 4, "num_stages": 3}
FACTORS_ANY = {"BLOCK_N": 64, "BLOCK_T": 32, "num_warps": 4, "num_stages": 2}
WRITE_FACTORS = {
    "BLOCK_ROWS": 64, "BLOCK_COLS": 128, "BLOCK_T": 32, "REPEATS": 1, "STAGES": 1, "PARTS": 4,
    "num_warps": 4, "num_stages": 3,
}  # fmt: skip
# Elements one by one take many registers: half the tile a thread spills none.
WRITE_FACTORS_ANY = {
    "BLOCK_ROWS": 64, "BLOCK_COLS": 64, "BLOCK_T": 32, "REPEATS": 1, "STAGES": 1, "PARTS": 4,
    "num_warps": 8, "num_stages": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One parameter in one fused step."""

    slot: Slot
    grad: Gradient
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
    factored: bool = False
    cut: int = 0  # which side ranks divide: `columns.py`; of what is not projected 1 is any

    @property
    def sums_projections(self) -> bool:
        """Whether each rank has a part of the smaller side, and so of every sum over it."""
        return self.cut == (2 if self.row_channels else 1) and self.rank is not None

    @property
    def sums_channels(self) -> bool:
        """Whether each rank has some of the channels."""
        return self.cut == (1 if self.row_channels else 2) and self.rank is not None

    @property
    def padded(self) -> int:
        """Rows of P that tensor cores want: a power of two from 16 on."""
        return max(16, 1 << ((self.rank or 0) - 1).bit_length())

    @property
    def by_descriptor(self) -> bool:
        """Whether `project_aligned` takes it. A box of the copy engine has at most 256 rows."""
        whole = self.aligned and not self.factored
        return whole and self.g_dtype == torch.bfloat16 and self.padded <= 256

    @property
    def projection(self) -> dict[str, int]:
        """Tile and launch of the projection."""
        if self.factored:
            return FACTORS if self.g_dtype == torch.bfloat16 else FACTORS_ANY
        if not self.by_descriptor:
            return PROJECT_ANY
        return PROJECT_WIDE if self.padded > 64 else PROJECT

    @property
    def gram(self) -> dict[str, int]:
        """Tile and launch of what is summed over the smaller side."""
        return GRAM if self.g_dtype == torch.bfloat16 else GRAM_ANY

    @property
    def c_rows(self) -> int:
        """Rows of P in a tile of C."""
        return min(self.padded, self.gram["BLOCK_T"])

    @property
    def writing(self) -> dict[str, int]:
        """Tile and launch of the write; BLOCK_T is read for factors alone."""
        if not self.factored:
            return WRITE
        fast = self.aligned and self.g_dtype == torch.bfloat16
        return WRITE_FACTORS if fast else WRITE_FACTORS_ANY

    @property
    def lanes(self) -> int:
        """Partial sums of a channel's squares that the threads of a program keep."""
        return min(2 * self.projection["num_warps"], self.projection["BLOCK_K"])

    def projected(self, n: int) -> int:
        """Elements of R for n channels; R is kept in whole tiles."""
        tile = self.projection["BLOCK_N"]
        return self.padded * tile * -(-n // tile) if self.rank is not None else 0

    def products(self, tokens: int, width: int) -> int:
        """Elements of C for so many tokens."""
        return (self.padded + tokens) * width

    def product_tiles(self, tokens: int) -> int:
        """Tiles of C for so many tokens, those below its diagonal included."""
        across = -(-tokens // self.gram["BLOCK_T"])
        return across * (self.padded // self.c_rows + across)


def fits(slot: Slot, grad: Gradient) -> bool:
    """Whether the kernels take this parameter; the reference path takes all others."""
    p = slot.param
    if not HAS_TRITON or not (p.is_cuda or INTERPRETED):
        return False
    if not _part_fits(slot) or p.dtype not in W_DTYPES or grad.dtype not in G_DTYPES:
        return False
    if isinstance(grad, Factored):
        return slot.rank is not None and _factors_fit(grad)
    return slot.rank is not None or (p.is_contiguous() and grad.is_contiguous())


def _part_fits(slot: Slot) -> bool:
    """Whether a part is of rows, of columns, of experts, or of elements one after another."""
    if slot.cut is None or (slot.cut == -3 and slot.rank is not None):
        return True
    flat = slot.rank is not None or slot.cut == -len(slot.root)
    return flat and len(slot.region.runs[slot.cut]) <= 2


def _factors_fit(grad: Factored) -> bool:
    if grad.dtype not in W_DTYPES or grad.right.dtype != grad.dtype:
        return False
    if grad.ends is not None and not (grad.ends.dtype == torch.int32 and grad.ends.is_contiguous()):
        return False
    return grad.left.stride(-1) == grad.right.stride(-1) == 1


def kind_of(work: Work) -> Kind:
    """The kind of a parameter and its gradient."""
    p, g, rank = work.slot.param, work.grad, work.slot.rank
    cut = cut_of(work.slot)
    if rank is None:
        return Kind(p.dtype, g.dtype, None, cut=cut)
    row_channels, w_unit = work.slot.tall, _unit(p)
    aligned = work.slot.aligned if cut else is_aligned(p)
    aligned = aligned and w_unit == 1 and is_aligned(g)
    if isinstance(g, Factored):
        return Kind(p.dtype, g.dtype, rank, row_channels, w_unit, 1, aligned, True, cut)
    aligned = aligned and _unit(g) == 1
    return Kind(p.dtype, g.dtype, rank, row_channels, w_unit, _unit(g), aligned, cut=cut)


def cut_of(slot: Slot) -> int:
    """Which side of its matrices ranks divide; experts are whole, if not all of them are here."""
    if slot.cut is None or slot.cut == -3:
        return 0
    return 1 if slot.rank is None else slot.cut + 3


def agree_on_alignment(slots: Sequence[Slot], ranks: Ranks) -> None:
    """Finds out of what ranks divide whether it is aligned on all: they launch the same kinds."""
    parts = [slot for slot in slots if slot.cut is not None]
    if not parts:
        return
    unaligned = torch.tensor([int(not _part_is_aligned(slot)) for slot in parts])
    ranks.sum(unaligned)
    for slot, found in zip(parts, unaligned.tolist(), strict=True):
        slot.aligned = not found


def _part_is_aligned(slot: Slot) -> bool:
    sides = (slot.root[-1], *(shifts_of(slot) if slot.cut == -1 else ()))
    return is_aligned(slot.param) and all(side % 8 == 0 for side in sides)


def layout(g: Gradient) -> tuple[object, ...]:
    """What of a gradient decides its kind and its tables."""
    if isinstance(g, Factored):
        return True, g.dtype, is_aligned(g)
    return False, g.dtype, g.stride(), is_aligned(g)


def is_aligned(g: Gradient) -> bool:
    """Whether vectors of eight elements begin at every eighth one of every row."""
    if isinstance(g, Factored):
        return all(
            t.data_ptr() % 16 == 0 and t.shape[1] % 8 == t.stride(0) % 8 == 0
            for t in (g.left, g.right)
        )
    if g.ndim < 2:
        return False
    sizes = (*g.shape[-2:], *g.stride()[:-1])
    return g.data_ptr() % 16 == 0 and all(size % 8 == 0 for size in sizes)


def _unit(t: Tensor) -> int:
    return 1 if t.stride(-1) == 1 else 2 if t.stride(-2) == 1 else 0

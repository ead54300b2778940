"""The fused step on CUDA: what is launched, over which parameters, with what scratch memory.

The arithmetic is in `kernels.py`, the algorithm beside the paper in `reference.py`. Everything here
is enqueued; nothing waits for the device, and what depends on the step (its number, learning rate)
is read from device memory, so that a captured CUDA graph can be replayed.
"""

from __future__ import annotations

import math
import os
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.optim.options import StepSettings
from apollo_trainer.optim.parameters import Slot
from apollo_trainer.optim.projection import normal_quantiles
from apollo_trainer.optim.reference import NORM_FLOOR
from apollo_trainer.optim.rounding import RoundingMode

try:
    import triton
    import triton.language as tl

    from apollo_trainer.optim import kernels
except ImportError:
    triton = None

# Triton's own switch: kernels then run in Python, on a CPU's tensors, to be looked into.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Scratch of one wave of matrices: their R must not need memory in proportion to the model.
WAVE_BYTES = 128 * 2**20
BLOCK_DRAW = 1024
BLOCK_ELEMENTS = 1024
BLOCK_MOMENTS = 64
BLOCK_N, BLOCK_N_WIDE = 128, 64
BLOCK_ROWS, BLOCK_COLS = 32, 128
WRITE_WARPS = 4
PROJECT = {"BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
PROJECT_WIDE = {"BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
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
class Work:
    """One parameter in one fused step."""

    slot: Slot
    grad: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True)
class _Kind:
    """What a launch is compiled for; parameters of one kind share launches."""

    w_dtype: torch.dtype
    g_dtype: torch.dtype
    rank: int | None
    row_channels: bool = True
    w_unit: int = 1
    g_unit: int = 1
    aligned: bool = False


@dataclass
class _Matrix:
    """A matrix, or a tensor that is not projected, as a row of `desc`."""

    slot: Slot
    state: dict[str, Tensor]
    index: int  # within a stack
    slot_number: int
    rows: int
    cols: int

    @property
    def n(self) -> int:
        return max(self.rows, self.cols)

    @property
    def k(self) -> int:
        return min(self.rows, self.cols)


@dataclass
class _Wave:
    """Matrices of one kind that are launched together, and the tables on the device."""

    kind: _Kind
    matrices: list[_Matrix]
    pointers: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    desc: Tensor | None = None
    tiles: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


class FusedStepper:
    """Launches the kernels for the parameters of one device.

    Args:
        mini: one factor a tensor instead of one a channel.
    """

    def __init__(self, device: torch.device, mini: bool):
        self.device, self.mini = device, mini
        self.rounding: RoundingMode = "stochastic"
        self._waves: dict[Any, list[_Wave]] = {}
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
        self.rounding = rounding
        key = tuple((id(w.slot), w.grad.dtype, w.grad.stride(), _aligned(w.grad)) for w in works)
        if key not in self._waves:
            self._waves[key] = _plan(works)
        flags = torch.zeros(len(works), dtype=torch.int32, device=self.device)
        changes: list[Tensor] = []
        grads = {id(w.slot): w.grad for w in works}
        for wave in self._waves[key]:
            self._describe(wave, grads, settings)
            launch = self._adam if wave.kind.rank is None else self._apollo
            change = launch(wave, flags, measure)
            if measure:
                changes.append(change.sum(0))
        total = torch.stack(changes).sum(0) if changes else None
        return flags.sum(dtype=torch.int64), total

    def _upload(self, host: Tensor) -> Tensor:
        # Pinned, so that the copy is enqueued; the allocator keeps the memory until it was made.
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def _describe(
        self, wave: _Wave, grads: dict[int, Tensor], settings: Sequence[StepSettings]
    ) -> None:
        """Renews the table when a tensor lies elsewhere than in the last step."""
        rank = wave.kind.rank
        pointers = tuple(
            tensor.data_ptr()
            for m in wave.matrices
            for tensor in (grads[id(m.slot)], m.slot.param, m.state["m"])
        )
        alphas = tuple(
            settings[m.slot.group].alpha(m.k, rank) if rank is not None else 1.0
            for m in wave.matrices
        )
        if wave.desc is None or (pointers, alphas) != (wave.pointers, wave.alphas):
            rows, offsets = [], _Offsets(rank or 0)
            for matrix, alpha in zip(wave.matrices, alphas, strict=True):
                rows.append(_row(matrix, grads[id(matrix.slot)], alpha, offsets))
            wave.sizes = vars(offsets)
            wave.desc = self._upload(torch.tensor(rows, dtype=torch.int64))
            wave.pointers, wave.alphas = pointers, alphas
        if not wave.tiles:
            wave.tiles = {k: self._upload(v) for k, v in _tiles(wave).items()}

    def _apollo(self, wave: _Wave, slot_flags: Tensor, measure: bool) -> Tensor:
        kind, tiles, settings = wave.kind, wave.tiles, self._settings_on_device
        rank, padded = kind.rank or 0, _padded(kind.rank or 0)
        make = {"dtype": torch.float32, "device": self.device}
        P = torch.empty(wave.sizes["p"], dtype=torch.bfloat16, device=self.device)
        R = torch.empty(wave.sizes["r"], **make)
        squares, factors = torch.empty((2, wave.sizes["s"]), **make)
        parts = torch.empty(wave.sizes["parts"] * 3, **make)
        flags = torch.zeros(2 * len(wave.matrices), dtype=torch.int32, device=self.device)
        rates = torch.empty(2 * len(wave.matrices), **make)
        changes = _changes(tiles["write"], self.device, measure)
        g_type = _TYPES[kind.g_dtype]
        along_k = 1 if kind.row_channels else 2
        unit = 0 if kind.g_unit == 0 else 1 if kind.g_unit == along_k else 2
        kernels.draw_projections[(len(tiles["draw"]),)](
            wave.desc, tiles["draw"], normal_quantiles(self.device), P, self._number, settings,
            RANK=rank, RANK_PADDED=padded, BLOCK=BLOCK_DRAW,
        )  # fmt: skip
        kernels.project[(len(tiles["project"]),)](
            wave.desc, tiles["project"], P, R, squares, flags,
            RANK=rank, RANK_PADDED=padded, ROW_CHANNELS=kind.row_channels, G_UNIT=unit,
            ALIGNED=kind.aligned, G_TYPE=g_type, BLOCK_N=_project_block(kind),
            EXACT=kind.g_dtype != torch.bfloat16, **(PROJECT_WIDE if padded > 64 else PROJECT),
        )  # fmt: skip
        kernels.moments[(len(tiles["moments"]),)](
            wave.desc, tiles["moments"], settings, R, squares, factors, parts, flags,
            1.0 / math.sqrt(rank), RANK=rank, BLOCK_R=min(64, padded), MINI=self.mini,
            ROW_CHANNELS=kind.row_channels, BLOCK_N=BLOCK_MOMENTS,
        )  # fmt: skip
        kernels.limit[(len(wave.matrices),)](
            wave.desc, settings, parts, flags, rates, slot_flags, NORM_FLOOR, MINI=self.mini,
            BLOCK=256,
        )  # fmt: skip
        kernels.write[(len(tiles["write"]),)](
            wave.desc, tiles["write"], settings, factors, rates, self._number, changes,
            W_TYPE=_TYPES[kind.w_dtype], G_TYPE=g_type, ROW_CHANNELS=kind.row_channels,
            W_UNIT=kind.w_unit, G_UNIT=kind.g_unit, ALIGNED=kind.aligned, MINI=self.mini,
            STOCHASTIC=self.rounding == "stochastic", SPLIT=self._splits(kind), MEASURE=measure,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS, num_warps=WRITE_WARPS,
        )  # fmt: skip
        return changes

    def _adam(self, wave: _Wave, slot_flags: Tensor, measure: bool) -> Tensor:
        kind, tiles = wave.kind, wave.tiles["elements"]
        flags = torch.zeros(2 * len(wave.matrices), dtype=torch.int32, device=self.device)
        changes = _changes(tiles, self.device, measure)
        types = {"G_TYPE": _TYPES[kind.g_dtype], "BLOCK": BLOCK_ELEMENTS}
        kernels.adam_check[(len(tiles),)](wave.desc, tiles, flags, **types)
        kernels.adam_write[(len(tiles),)](
            wave.desc, tiles, self._settings_on_device, flags, slot_flags, self._number, changes,
            W_TYPE=_TYPES[kind.w_dtype], STOCHASTIC=self.rounding == "stochastic",
            SPLIT=self._splits(kind), MEASURE=measure, **types,
        )  # fmt: skip
        kernels.adam_count[(len(wave.matrices),)](wave.desc, flags, slot_flags)
        return changes

    def _splits(self, kind: _Kind) -> bool:
        return self.rounding == "split16" and kind.w_dtype == torch.bfloat16


def _changes(tiles: Tensor, device: torch.device, measure: bool) -> Tensor:
    return torch.empty((len(tiles) if measure else 0, 2), dtype=torch.float64, device=device)


@dataclass
class _Offsets:
    """Where the next matrix of a wave begins in each piece of scratch, in elements."""

    rank: int
    p: int = 0
    r: int = 0
    s: int = 0
    parts: int = 0

    def take(self, matrix: _Matrix) -> tuple[int, int, int, int, int]:
        """Offsets of P, R, the channels, the parts, and how many parts there are."""
        count = -(-matrix.n // BLOCK_MOMENTS)
        taken = (self.p, self.r, self.s, self.parts, count)
        # A multiple of 8 elements keeps the next P aligned for vector loads.
        self.p += -(-_padded(self.rank) * matrix.k // 8) * 8
        self.r += self.rank * matrix.n
        self.s += matrix.n
        self.parts += count
        return taken


def _padded(rank: int) -> int:
    """Rows of P that tensor cores want: a power of two from 16 on."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def _project_block(kind: _Kind) -> int:
    wide = _padded(kind.rank or 0) > 64 or kind.g_dtype != torch.bfloat16
    return BLOCK_N_WIDE if wide else BLOCK_N


def _plan(works: Sequence[Work]) -> list[_Wave]:
    """Sorts parameters into kinds, and each kind into waves of bounded scratch."""
    kinds: dict[_Kind, list[_Matrix]] = defaultdict(list)
    for number, work in enumerate(works):
        kinds[_kind(work)] += _matrices(work, number)
    waves = []
    for kind, matrices in kinds.items():
        room, wave = 0, _Wave(kind, [])
        for matrix in matrices:
            need = 4 * (kind.rank or 0) * matrix.n
            if wave.matrices and room + need > WAVE_BYTES:
                waves.append(wave)
                room, wave = 0, _Wave(kind, [])
            wave.matrices.append(matrix)
            room += need
        waves.append(wave)
    return waves


def _matrices(work: Work, number: int) -> list[_Matrix]:
    slot, state, p = work.slot, work.state, work.slot.param
    if slot.rank is None:
        return [_Matrix(slot, state, 0, number, 1, p.numel())] if p.numel() else []
    rows, cols = p.shape[-2:]
    return [_Matrix(slot, state, e, number, rows, cols) for e in range(p[..., 0, 0].numel())]


def _kind(work: Work) -> _Kind:
    p, g, rank = work.slot.param, work.grad, work.slot.rank
    if rank is None:
        return _Kind(p.dtype, g.dtype, None)
    w_unit, g_unit = (_unit(t) for t in (p, g))
    aligned = w_unit == g_unit == 1 and all(_aligned(t) for t in (p, g))
    return _Kind(p.dtype, g.dtype, rank, p.shape[-2] >= p.shape[-1], w_unit, g_unit, aligned)


def _unit(t: Tensor) -> int:
    return 1 if t.stride(-1) == 1 else 2 if t.stride(-2) == 1 else 0


def _aligned(t: Tensor) -> bool:
    """Whether vectors of eight elements begin at every eighth one of every row."""
    if t.ndim < 2:
        return False
    sizes = (*t.shape[-2:], *t.stride()[:-1])
    return t.data_ptr() % 16 == 0 and all(size % 8 == 0 for size in sizes)


def _row(matrix: _Matrix, grad: Tensor, alpha: float, offsets: _Offsets) -> list[int]:
    """A row of `desc`, its columns in the order of kernels.py."""
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
        *(*slot.projection_key, *slot.rounding_key, *offsets.take(matrix)),
        *(matrix.slot_number, int(stacked), slot.group, _bits(alpha)),
    ]


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _tiles(wave: _Wave) -> dict[str, Tensor]:
    """Tables of (matrix, tile), int32 [tiles, 2], for each kernel."""
    kind = wave.kind
    if kind.rank is None:
        return {"elements": _table([-(-m.cols // BLOCK_ELEMENTS) for m in wave.matrices])}
    padded, block_n = _padded(kind.rank), _project_block(kind)
    counts = {
        "draw": [-(-padded * m.k // BLOCK_DRAW) for m in wave.matrices],
        "project": [-(-m.n // block_n) for m in wave.matrices],
        "moments": [-(-m.n // BLOCK_MOMENTS) for m in wave.matrices],
        "write": [-(-m.rows // BLOCK_ROWS) * -(-m.cols // BLOCK_COLS) for m in wave.matrices],
    }
    return {name: _table(count) for name, count in counts.items()}


def _table(counts: list[int]) -> Tensor:
    per_matrix = torch.tensor(counts, dtype=torch.int64)
    matrix = torch.repeat_interleave(torch.arange(len(counts)), per_matrix)
    first = torch.repeat_interleave(per_matrix.cumsum(0) - per_matrix, per_matrix)
    return torch.stack((matrix, torch.arange(len(matrix)) - first), 1).to(torch.int32)


_TYPES: dict[torch.dtype, Any] = (
    {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float16: tl.float16}
    if triton is not None
    else {}
)

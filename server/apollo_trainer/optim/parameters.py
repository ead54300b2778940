"""What the optimizer knows of each parameter: its name, rank, random keys and tied tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from apollo_grpc.region import Region
from apollo_trainer.optim.factored import Factored, Gradient, total
from apollo_trainer.optim.philox import Key, derive_key
from apollo_trainer.optim.rounding import RoundingMode
from apollo_trainer.parallel.parts import NO_REGIONS, Lines

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Place = tuple[torch.device, torch.dtype, int, tuple[int, ...], tuple[int, ...]]


@dataclass
class Slot:
    """One parameter, or this rank's part of one. `rank` is None where plain Adam serves it.

    `index` counts from 1, `group` is the position of its parameter group. What is decided by a
    shape is decided by that of the whole parameter, `region.root`.

    `aliases` are other tensors over the same memory: their gradients are added, and the memory is
    stepped once.
    """

    name: str
    param: Tensor
    index: int
    group: int
    rank: int | None
    region: Region
    projection_key: Key = (0, 0)
    rounding_key: Key = (0, 0)
    aliases: list[Tensor] = field(default_factory=list)
    # Whether vectors of eight elements begin at every eighth one of every row, on every rank that
    # has a part; the numbers of a part's rows and columns in the whole too.
    aligned: bool = False

    @property
    def root(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.region.root

    @property
    def tall(self) -> bool:
        """Whether the larger side of a matrix is its rows; so where both are equal."""
        return self.root[-2] >= self.root[-1]

    @property
    def large(self) -> int:
        """The dimension of a matrix's larger side: -2 or -1; the other is the smaller one's."""
        return -2 if self.tall else -1

    @property
    def cut(self) -> int | None:
        """The dimension along which ranks divide it, from the last, which is -1; None for none."""
        sides = zip(self.region.shape, self.root, strict=True)
        cut = [k - len(self.root) for k, (own, all_of_it) in enumerate(sides) if own != all_of_it]
        return cut[0] if cut else None

    def region_of(self, part: str) -> Region:
        """Which part of the whole state of the parameter this rank's tensor `part` is."""
        root, runs = self.root, self.region.runs
        if part == "low" or (part in "mv" and self.rank is None):
            return self.region
        if self.rank is None:
            return Region.whole_of(())
        if part in "mv":
            root = (*root[:-2], self.rank, root[self.large])
            runs = (*runs[:-2], ((0, self.rank),), runs[self.large])
        else:
            root, runs = root[:-2], runs[:-2]
        return Region(root, runs, self.region.replica)

    @cached_property
    def lines(self) -> Lines | None:
        """The numbers of its elements in the whole; None where it is the whole."""
        return None if self.region.whole else Lines.of(self.region)

    def set_seed(self, seed: int) -> None:
        """Derives both keys from the optimizer's seed and the parameter's name."""
        self.projection_key = derive_key(seed, self.name, "projection")
        self.rounding_key = derive_key(seed, self.name, "rounding")

    def gradient(self, given: Mapping[Tensor, Gradient] | None = None) -> Gradient | None:
        """The gradient over this memory, or None where there is none; those of ties are summed.

        Args:
            given: gradients by tensor, instead of the tensors' own.
        """
        tensors = (self.param, *self.aliases)
        found = (t.grad if given is None else given.get(t) for t in tensors)
        grads = [grad for grad in found if grad is not None]
        for grad in grads:
            if isinstance(grad, Tensor) and grad.is_sparse:
                raise RuntimeError(
                    f"{self.name}: the gradient is sparse; nothing was changed. Use dense "
                    "gradients, such as nn.Embedding(sparse=False)."
                )
        if not grads:
            return None
        whole = total(grads)
        if self.rank is None and isinstance(whole, Factored):
            return whole.dense(self.param.dtype)
        return whole


def shifts_of(slot: Slot) -> tuple[int, int, int]:
    """How much further on the whole has the rows, columns or elements of a part.

    Of one run or two: how many are the first one's, and how far each of these and of the others is.
    """
    if slot.cut is None or slot.cut == -3:
        return 0, 0, 0
    runs = slot.region.runs[slot.cut]
    at = runs[0][1]
    shifts = at, runs[0][0], runs[-1][0] - at * (len(runs) - 1)
    if slot.rank is not None:
        return shifts
    inner = math.prod(slot.root[1:])
    return shifts[0] * inner, shifts[1] * inner, shifts[2] * inner


def new_state(slot: Slot, mode: RoundingMode) -> dict[str, Tensor]:
    """Zeroed state of one parameter, on its device.

    A matrix [a, b] with rank r has moments m, v [r, max(a, b)], a stack [E, a, b] has them
    [E, r, max(a, b)], of the larger side this rank's part, anything else in its own shape; all
    float32. `step` (int64) counts its updates and `norm` (float32) is the limiter's last norm, both
    one per matrix. `low` (int16) is the lower half of the weights under split16.
    """
    p, device = slot.param, slot.param.device
    counts = p.shape[:-2] if slot.rank is not None else torch.Size()
    shape = p.shape if slot.rank is None else (*counts, slot.rank, p.shape[slot.large])
    state = {
        "m": torch.zeros(shape, dtype=torch.float32, device=device),
        "v": torch.zeros(shape, dtype=torch.float32, device=device),
        "step": torch.zeros(counts, dtype=torch.int64, device=device),
    }
    if slot.rank is not None:
        state["norm"] = torch.zeros(counts, dtype=torch.float32, device=device)
    if mode == "split16" and p.dtype == torch.bfloat16:
        state["low"] = torch.zeros(p.shape, dtype=torch.int16, device=device)
    return state


def _effective_rank(root: tuple[int, ...], rank: int | None) -> int | None:
    """The rank of a matrix or a stack of matrices [E, a, b] no smaller than it, otherwise None."""
    if rank is None or len(root) not in (2, 3) or min(root[-2:]) < rank:
        return None
    return rank if math.prod(root) else None


def named(params: Iterable[Any], first: int) -> list[tuple[str, Tensor]]:
    """Pairs of name and tensor; tensors without a name get `parameter_<n>`, from `first` on."""
    pairs = []
    for n, item in enumerate([params] if isinstance(params, Tensor) else list(params), first):
        name, tensor = item if isinstance(item, tuple) else (f"parameter_{n}", item)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: a parameter is a tensor, not {type(tensor).__name__}.")
        pairs.append((str(name), tensor))
    return pairs


def sort_out(
    pairs: Iterable[tuple[str, Tensor]],
    slots: Sequence[Slot],
    group: int,
    *,
    rank: int | None,
    mode: RoundingMode,
    regions: Mapping[str, Region] = NO_REGIONS,
) -> tuple[list[Slot], list[tuple[Tensor, Slot]]]:
    """Sorts tensors into new parameters of `group` and into ties with others; registers nothing.

    Args:
        regions: by name, of the parameters of which this rank has a part.

    Raises ValueError naming the tensor that cannot be a parameter beside `slots`.
    """
    new: list[Slot] = []
    ties: list[tuple[Tensor, Slot]] = []
    known = {id(t) for slot in slots for t in (slot.param, *slot.aliases)}
    places = {place(slot.param): slot for slot in slots if slot.param.numel()}
    names = {slot.name for slot in slots}
    for name, tensor in pairs:
        if id(tensor) in known:
            continue
        _check_parameter(name, tensor, mode)
        known.add(id(tensor))
        tied = places.get(place(tensor))
        if tied is not None:
            ties.append((tensor, tied))
            continue
        if name in names:
            raise ValueError(f"{name}: two parameters have this name.")
        _check_overlap(name, tensor, (*slots, *new))
        index = len(slots) + len(new) + 1
        region = _region(name, tensor, regions.get(name))
        new.append(Slot(name, tensor, index, group, _effective_rank(region.root, rank), region))
        names.add(name)
        if tensor.numel():
            places[place(tensor)] = new[-1]
    return new, ties


def _region(name: str, param: Tensor, region: Region | None) -> Region:
    """Which part of its parameter a tensor is. Raises ValueError where that cannot be stepped."""
    if region is None:
        return Region.whole_of(param.shape)
    if region.shape != tuple(param.shape):
        raise ValueError(f"{name}: its region is {region.shape}, and the tensor another shape.")
    if region.complete:
        # In another order on every rank: each steps it as it lies.
        return replace(Region.whole_of(param.shape), replica=region.replica)
    if sum(own != side for own, side in zip(region.shape, region.root, strict=True)) > 1:
        raise ValueError(f"{name}: ranks divide it along more than one of its dimensions.")
    return region


def _check_parameter(name: str, param: Tensor, mode: RoundingMode) -> None:
    """Raises ValueError naming a parameter that cannot be stepped."""
    if param.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {param.dtype} is not supported; it is one of {DTYPES}.")
    if mode == "split16" and param.dtype == torch.float16:
        raise ValueError(
            f"{name}: rounding='split16' needs bfloat16 or float32, and this is float16; use "
            "rounding='stochastic'."
        )
    if param.layout != torch.strided:
        raise ValueError(f"{name}: layout {param.layout} is not supported, only dense tensors.")
    if any(n > 1 and s == 0 for n, s in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(f"{name}: is an expanded view, whose elements share memory.")


def place(param: Tensor) -> Place:
    """What two tied tensors have in common: device, dtype, address, shape and strides."""
    sides = [(n, s) for n, s in zip(param.shape, param.stride(), strict=True) if n > 1]
    strides = tuple(s for _, s in sides)
    return param.device, param.dtype, param.data_ptr(), tuple(param.shape), strides


def _check_overlap(name: str, param: Tensor, others: Iterable[Slot]) -> None:
    """Raises ValueError where two gapless tensors share a part of their memory.

    Views with gaps are not compared: their spans may interleave without sharing an element.
    """
    span = _gapless_span(param)
    for other in others:
        theirs = _gapless_span(other.param)
        if not span or not theirs or span[0] != theirs[0]:
            continue
        if span[1] < theirs[2] and theirs[1] < span[2]:
            raise ValueError(
                f"{name}: shares a part of its memory with {other.name}; it would be stepped "
                "twice. Give each element to one parameter only."
            )


def _gapless_span(param: Tensor) -> tuple[torch.device, int, int] | None:
    sides = sorted((s, n) for n, s in zip(param.shape, param.stride(), strict=True) if n > 1)
    expected = 1
    for stride, size in sides:
        if stride != expected:
            return None
        expected *= size
    start = param.data_ptr()
    if not start or not param.numel():
        return None
    return param.device, start, start + param.numel() * param.element_size()

"""Records what vLLM's weight loader would write where, without letting it write.

vLLM's own `load_weights` runs on meta tensors: views of one storage for each training parameter.
Every write to a live weight is recorded and skipped, so no weight memory is needed and the live
bytes stay as they are. Copies of meta tensors (clone, contiguous, to) are kept as views of their
source, so an address within the source is never lost. What a loader computes is followed only so
far that a refusal can say which source it came from.

Of a loader that puts rows into another order, a second load of numbers in place of values tells
which row went where: float64 tensors that are no meta tensors are such numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_grpc.region import reach

# Ops whose result, on a meta tensor, is the same elements in the same order.
_SAME_ELEMENTS = frozenset({"clone", "_to_copy", "contiguous", "detach_copy", "lift_fresh_copy"})
_RESHAPES = frozenset({"view", "_unsafe_view"})
# What scalars that a loader reads of sources are told apart by; a float64 holds 1 + n * 2**-40.
_SCALAR_STEP = 2.0**-40


@dataclass(frozen=True)
class Elements:
    """Elements of a storage: offset + sum(index * stride), in elements of the tensor's dtype."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Elements:
        """The elements that a tensor views."""
        key = tensor.untyped_storage()._cdata
        return cls(key, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))

    def bounds(self) -> tuple[int, int]:
        """First and last element touched, both included; there must be one."""
        return self.offset, self.offset + reach(self.shape, self.stride) - 1


@dataclass(frozen=True)
class Copy:
    """A recorded copy of a source region onto a live region of the same shape."""

    source: Elements
    target: Elements
    dtype: torch.dtype


@dataclass(frozen=True)
class OtherWrite:
    """A write to live weights that is no copy of a source, by the operator's name.

    `copies_before` is how many copies had been recorded: what is copied later hides the write.
    `origins` are the storages of the sources that its value was computed from.
    """

    operator: str
    target: Elements
    dtype: torch.dtype
    copies_before: int
    origins: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Numbered:
    """Numbers that were written in place of values.

    Attributes:
        first: of each row of the target, int64 [rows]; the rest of a row counts on from there.
    """

    first: torch.Tensor
    target: Elements
    dtype: torch.dtype


class LoaderTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, writes to `live` storages are recorded instead of done.

    Args:
        live: storages of the live weights.
        sources: one meta tensor for each source, each with a storage of its own.

    Attributes:
        rearranged: storages of sources whose elements the loader puts into an order that no
            strides of the source express.
        numbered: what was written of numbers, where each row of a target counts on.
    """

    def __init__(self, live: Iterable[torch.UntypedStorage], sources: Iterable[torch.Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = {storage._cdata for storage in live}
        # A storage's address may be used again once it is freed, and name another source.
        self._kept: list[torch.Tensor] = list(sources)
        self._sources = {source.untyped_storage()._cdata for source in self._kept}
        self._origins = {storage: frozenset({storage}) for storage in self._sources}
        self.rearranged: set[int] = set()
        self.copies: list[Copy] = []
        self.other_writes: list[OtherWrite] = []
        self.numbered: list[Numbered] = []
        self._scalars: dict[float, torch.Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skips and records writes to live storages; runs everything else."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        written = _written_tensors(func, args, kwargs)
        # What is copied out of a source that the loader changed is no longer the checkpoint's;
        # recorded as a copy, it would be trained as if it were.
        self._sources -= {t.untyped_storage()._cdata for t in written if t.is_meta}
        if written := [t for t in written if self._is_live(t)]:
            self._record(name, args, kwargs, written)
            return written[0] if func._schema.returns else None
        if not any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        return self._on_meta(name, func, args, kwargs)

    def _on_meta(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in _SAME_ELEMENTS:
            return torch.ops.aten.alias.default(args[0])
        # Loaders compare or read scalars of a checkpoint; meta tensors hold no values. One that is
        # written as it was read is a copy; what is computed from it refuses the parameter.
        if name == "_local_scalar_dense":
            return self._scalar(args[0])
        if name == "equal":
            return True
        try:
            result = func(*args, **kwargs)
        except RuntimeError:
            # The copy before it was kept as a view, whose strides do not allow the new shape.
            if name not in _RESHAPES or not self._is_source(args[0]):
                raise
            self.rearranged.add(args[0].untyped_storage()._cdata)
            result = func(torch.empty(args[0].shape, dtype=args[0].dtype, device="meta"), *args[1:])
        self._follow(result, self._origins_of((args, kwargs)))
        return result

    def _follow(self, result: Any, origins: frozenset[int]) -> None:
        for tensor in tree_leaves(result):
            if origins and isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._kept.append(tensor)
                self._origins.setdefault(tensor.untyped_storage()._cdata, origins)

    def _origins_of(self, values: Any) -> frozenset[int]:
        found: frozenset[int] = frozenset()
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                found |= self._origins.get(leaf.untyped_storage()._cdata, frozenset())
        return found

    def _scalar(self, tensor: torch.Tensor) -> float:
        """1, or a number near it that stands for the only element of a storage, and no other."""
        if tensor.untyped_storage().nbytes() > tensor.element_size():
            return 1.0
        value = 1.0 + (len(self._scalars) + 1) * _SCALAR_STEP
        self._scalars[value] = tensor
        return value

    def _is_live(self, tensor: torch.Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self._live

    def _record(
        self, name: str, args: Any, kwargs: dict[str, Any], written: list[torch.Tensor]
    ) -> None:
        target, source = written[0], self._copied(name, args)
        one = source is not None and source.numel() == target.numel() == 1
        if source is not None and self._is_source(source) and (one or name == "copy_"):
            source = source.view(target.shape) if one else source.expand(target.shape)
            self.copies.append(Copy(Elements.of(source), Elements.of(target), target.dtype))
            return
        if source is not None and (numbers := _numbers(source, target)):
            self.numbered.append(numbers)
            return
        origins, before = self._origins_of((source, args, kwargs)), len(self.copies)
        for tensor in written:
            self.other_writes.append(
                OtherWrite(name, Elements.of(tensor), tensor.dtype, before, origins)
            )

    def _copied(self, name: str, args: Any) -> torch.Tensor | None:
        """The tensor whose elements are written as they are, one that was read as a scalar too."""
        value = args[1] if name in ("copy_", "fill_") else None
        if isinstance(value, float):
            return self._scalars.get(value)
        return value if isinstance(value, torch.Tensor) else None

    def _is_source(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta and tensor.untyped_storage()._cdata in self._sources


def _numbers(source: torch.Tensor, target: torch.Tensor) -> Numbered | None:
    """None for other values than numbers that count on along each row."""
    numbered = source.dtype is torch.float64 and not source.is_meta
    if not numbered or source.shape != target.shape or not source.ndim or not source.numel():
        return None
    rows = source.reshape(len(source), -1)
    if not torch.equal(rows, rows[:, :1] + torch.arange(rows.shape[1], device=rows.device)):
        return None
    return Numbered(rows[:, 0].long().cpu(), Elements.of(target), target.dtype)


def _written_tensors(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors, also inside lists, that an operator's schema says it writes to."""
    written: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return written

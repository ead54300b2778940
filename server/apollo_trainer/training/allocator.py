"""How much memory torch's caching allocator would take from a CUDA device for some tensors.

The tensors may be on the meta device: nothing has to be allocated to know it.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Of c10/cuda/CUDACachingAllocator: what is asked for is rounded up, and cut from segments.
_ROUND, _SMALL = 512, 2**20
_SMALL_SEGMENT, _LARGE_SEGMENT, _LARGEST_SHARED = 2 * 2**20, 20 * 2**20, 10 * 2**20


@dataclass(eq=False)
class _Block:
    """A piece of a segment, and its neighbours there."""

    size: int
    at: int
    small: bool
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False


@dataclass
class CachingAllocator:
    """torch's caching allocator of one stream, without a device.

    Attributes:
        reserved: bytes that the device has given; none is given back.
    """

    reserved: int = 0
    _free: dict[bool, list[tuple[int, int, _Block]]] = field(
        default_factory=lambda: {True: [], False: []}
    )

    def take(self, size: int) -> _Block:
        """The smallest free piece that is large enough, of a new segment where there is none."""
        size = max(_ROUND, _up(size, _ROUND))
        small = size <= _SMALL
        free = self._free[small]
        # Addresses of segments grow, so that pieces of one size are taken by age.
        place = bisect_left(free, (size, -1))
        block = free.pop(place)[2] if place < len(free) else self._segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= _ROUND if small else rest > _SMALL:
            self._split(block, size)
        return block

    def give(self, block: _Block) -> None:
        """Takes a piece back, and joins it with free neighbours."""
        before, after = block.before, block.after
        if before and before.free:
            self._forget(before)
            block.at, block.size = before.at, before.size + block.size
            block.before = before.before
            if block.before:
                block.before.after = block
        if after and after.free:
            self._forget(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after:
                block.after.before = block
        self._keep(block)

    def _segment(self, size: int, small: bool) -> _Block:
        if small:
            whole = _SMALL_SEGMENT
        else:
            whole = _LARGE_SEGMENT if size < _LARGEST_SHARED else _up(size, _SMALL_SEGMENT)
        block = _Block(whole, self.reserved, small)
        self.reserved += whole
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.size - size, block.at + size, block.small, block, block.after)
        if block.after:
            block.after.before = rest
        block.size, block.after = size, rest
        self._keep(rest)

    def _keep(self, block: _Block) -> None:
        block.free = True
        # No two pieces have one address: blocks themselves are never compared.
        insort(self._free[block.small], (block.size, block.at, block))

    def _forget(self, block: _Block) -> None:
        free = self._free[block.small]
        free.pop(bisect_left(free, (block.size, block.at)))


class Allocations(TorchDispatchMode):
    """Takes memory from an allocator for tensors made inside, and gives it back when they are gone.

    Views and what is written in place take none. Memory that a kernel has for itself is not seen.

    Args:
        allocator: that the memory comes from.
        device: only what is made there counts.

    Attributes:
        live: bytes of what was made inside and is there now, as asked for.
        peak: the most that this was.
        made: how many tensors with memory of their own there were.
    """

    def __init__(self, allocator: CachingAllocator, device: str = "meta"):
        super().__init__()  # type: ignore[no-untyped-call]
        self._allocator, self._device = allocator, device
        self.live = self.peak = self.made = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, and sees what memory its results have."""
        given = {each.untyped_storage()._cdata for each in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for each in _tensors(result):
            storage = each.untyped_storage()
            here = each.device.type == self._device
            if here and storage._cdata not in given and storage._cdata not in self._known:
                self._take(storage)
        return result

    def _take(self, storage: Any) -> None:
        size, key = storage.nbytes(), storage._cdata
        if not size:
            return
        block = self._allocator.take(size)

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size
            self._allocator.give(block)

        self._known[key] = weakref.ref(storage, gone)
        self.live, self.made = self.live + size, self.made + 1
        self.peak = max(self.peak, self.live)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for each in found:
            yield from _tensors(each)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))


def _up(size: int, step: int) -> int:
    return -(-size // step) * step

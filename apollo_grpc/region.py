"""Which part of a parameter one rank holds, and the proof that the ranks hold all of it once.

A rank of a model that is served by several workers holds a part of most parameters. On one rank a
region is the whole, or the whole with its rows in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, pairwise, product

Shape = tuple[int, ...]
Runs = tuple[tuple[int, int], ...]  # first index and count, in the order in which they lie


def reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first that a strided view touches to the last, both counted."""
    return sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1


def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides of a shape, in elements."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


@dataclass(frozen=True)
class Region:
    """Boxes in the index space of a parameter, the root, that one local view tiles in order.

    Along dimension k the view has the root's indices runs[k], one run after the other, and a box is
    the product of one run of each dimension.

    Attributes:
        root: shape of the whole parameter.
        runs: for each of its dimensions.
        replica: which of the ranks that hold this same region this one is, from 0. Sums over ranks
            count the first one's part alone.

    Raises ValueError where a run is outside the root, or two overlap.
    """

    root: Shape
    runs: tuple[Runs, ...]
    replica: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if len(self.runs) != len(self.root):
            raise ValueError(f"it has runs along {len(self.runs)} of {len(self.root)} dimensions")
        joined = tuple(_joined(runs) for runs in self.runs)
        object.__setattr__(self, "runs", joined)
        for size, runs in zip(self.root, joined, strict=True):
            ends = [0, *(end for start, count in sorted(runs) for end in (start, start + count))]
            if not runs or any(a > b for a, b in pairwise(ends)) or ends[-1] > size:
                raise ValueError("it has an index twice, or one that its parameter has not")

    @classmethod
    def whole_of(cls, root: Sequence[int]) -> Region:
        """All of a parameter, in its order."""
        return cls(tuple(root), tuple(((0, size),) for size in root))

    @cached_property
    def shape(self) -> Shape:
        """Of the local view."""
        return tuple(sum(count for _, count in runs) for runs in self.runs)

    @cached_property
    def whole(self) -> bool:
        """Whether it is all of the parameter, in its order."""
        return all(self.is_whole(k) for k in range(len(self.root)))

    @cached_property
    def complete(self) -> bool:
        """Whether it is all of the parameter, in some order."""
        return self.shape == self.root

    @property
    def counted(self) -> bool:
        """Whether this rank's part counts in a sum over ranks."""
        return self.replica == 0

    def is_whole(self, dimension: int) -> bool:
        """Whether the view has all indices of a dimension, in order."""
        return self.runs[dimension] == ((0, self.root[dimension]),)

    def indices(self, dimension: int) -> list[int]:
        """The root's index of each of the view's along a dimension."""
        return [i for start, count in self.runs[dimension] for i in range(start, start + count)]

    def boxes(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Indices of each box in the view and in the parameter, in the view's order."""
        for box in product(*(list(_placed(runs)) for runs in self.runs)):
            yield tuple(own for own, _ in box), tuple(there for _, there in box)

    def apart(self, other: Region) -> bool:
        """Whether no element is in both."""
        return any(_apart(a, b) for a, b in zip(self.runs, other.runs, strict=True))


def replicas(regions: Sequence[Region]) -> list[int]:
    """Which replica each rank's region of one parameter is, from 0: the proof over all ranks.

    Raises ValueError with the reason unless each element is held, and each by as many ranks.
    """
    holders: dict[Region, list[int]] = {}
    for rank, region in enumerate(regions):
        holders.setdefault(region, []).append(rank)
    if not regions or len({region.root for region in regions}) != 1:
        raise ValueError("the ranks hold parameters of different shapes")
    held, total = sum(math.prod(r.shape) for r in holders), math.prod(regions[0].root)
    if held < total:
        raise ValueError(f"only {held} of its {total} elements are copied to the live weights")
    if held > total or not all(a.apart(b) for a, b in combinations(holders, 2)):
        raise ValueError("ranks hold parts of it that overlap and are not the same")
    if len({len(ranks) for ranks in holders.values()}) != 1:
        raise ValueError("some of its elements are held by more ranks than others")
    return [holders[region].index(rank) for rank, region in enumerate(regions)]


def _joined(runs: Runs) -> Runs:
    """Runs that follow each other as one; those of no index are left out."""
    joined: list[tuple[int, int]] = []
    for start, count in runs:
        if count < 0:
            raise ValueError("it has a run of fewer than no indices")
        if joined and count and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        elif count or not joined:
            joined.append((start, count))
    return tuple(joined)


def _placed(runs: Runs) -> Iterator[tuple[slice, slice]]:
    """Of each run, where it is in the view, and where in the parameter."""
    own = 0
    for start, count in runs:
        yield slice(own, own + count), slice(start, start + count)
        own += count


def _apart(one: Runs, other: Runs) -> bool:
    ordered = sorted((*one, *other))
    return all(a + count <= b for (a, count), (b, _) in pairwise(ordered))

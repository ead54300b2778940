"""A rank's part of a tensor: where its elements are in the whole, and the whole out of parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType

import torch
from torch import Tensor

from apollo_grpc.region import Region, contiguous_strides
from apollo_trainer.parallel.ranks import Ranks

NO_REGIONS: Mapping[str, Region] = MappingProxyType({})


@dataclass(frozen=True)
class Lines:
    """The elements of a region, row-major in its own shape, as lines of consecutive numbers.

    An element's number is that in row-major order of the whole parameter.

    Attributes:
        starts: number of the first element of each line, int64 [lines], on the CPU.
        width: elements of a line.
    """

    starts: Tensor
    width: int

    @classmethod
    def of(cls, region: Region) -> Lines:
        """Those of a region, as wide as they can all be."""
        places, cut = contiguous_strides(region.root), _last_cut(region)
        if cut is None:
            return cls(torch.zeros(1, dtype=torch.int64), math.prod(region.root))
        length = math.gcd(*(count for _, count in region.runs[cut]))
        firsts = [i for start, n in region.runs[cut] for i in range(start, start + n, length)]
        offsets = [torch.tensor(region.indices(k)) * places[k] for k in range(cut)]
        offsets.append(torch.tensor(firsts) * places[cut])
        starts = reduce(lambda outer, inner: (outer[:, None] + inner).flatten(), offsets)
        return cls(starts, length * places[cut])

    def pieces(self, first: int, count: int, most: int = 2**20) -> Iterator[tuple[Tensor, int]]:
        """The numbers of some elements of the region, as lines: their starts, and their width.

        Args:
            first, count: the elements, by their place in the region.
            most: elements of a piece of several lines.
        """
        end, several = first + count, max(1, most // max(1, self.width))
        while first < end:
            line, skipped = divmod(first, self.width)
            lines = min(several, (end - first) // self.width) if not skipped else 0
            if lines:
                yield self.starts[line : line + lines], self.width
                first += lines * self.width
                continue
            width = min(self.width - skipped, end - first)
            yield self.starts[line : line + 1] + skipped, width
            first += width


def gathered(own: Tensor, region: Region, ranks: Ranks) -> Tensor:
    """The whole, out of all ranks' parts; the part itself where that is the whole."""
    if region.whole:
        return own
    whole = own.new_zeros(region.root)
    for there, box in region.boxes() if region.counted else ():
        whole[box] = own[there]
    # Each byte is one rank's, and zero on the others.
    ranks.sum(whole.view(-1).view(torch.uint8))
    return whole


def handed_out(whole: Tensor | None, like: Tensor, region: Region, ranks: Ranks) -> Tensor:
    """A rank's part of what the first rank has whole; every rank calls it.

    Args:
        whole: on the CPU, contiguous; its values are lost. None on the other ranks.
        like: a tensor of the same dtype.
    """
    if whole is None:
        whole = torch.zeros(region.root, dtype=like.dtype)
    ranks.sum(whole.view(-1).view(torch.uint8))
    return part_of(whole, region)


def part_of(whole: Tensor, region: Region) -> Tensor:
    """A rank's part, out of the whole; the whole itself where it is that."""
    if region.whole:
        return whole
    own = whole.new_empty(region.shape)
    for there, box in region.boxes():
        own[there] = whole[box]
    return own


def _last_cut(region: Region) -> int | None:
    """The last dimension that the region has not all of, in order."""
    cut = [k for k in range(len(region.root)) if not region.is_whole(k)]
    return cut[-1] if cut else None

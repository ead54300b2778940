"""Solves for the one strided view that a set of recorded copies amounts to, by exact integers.

A training parameter of shape S is cut by vLLM's loader into copies. Each copy pairs a strided part
of the parameter with a strided part of the live weights. What is copied is a view of the live
weights when it is a region, each of whose dimensions k has some of the parameter's indices in some
order, and there are a base and strides T with

    live address of element i  =  base + sum_k i_k * T_k      for every element i of the region,

and the copies cover every element exactly once. Both are proved here, not sampled: copies are
turned into boxes of index space, whose volumes must add up to the region's and which must not
overlap. What cannot be proved is refused with the reason. That the region is all of the parameter,
or that those of several workers are together, is proved by who reads the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from apollo_grpc.region import Region, Runs, Shape, contiguous_strides

_NO_STRIDES = "its pieces lie at places that one set of strides cannot express"


class NotAView(Exception):
    """The copies are not one strided view of the live weights; the message says why."""


class Rearranged(NotAView):
    """None of it is copied in an order that strides express; its rows may lie in another one."""


class Computed(Rearranged):
    """All that is written of it is computed, or put together from it."""


@dataclass(frozen=True)
class Box:
    """A copy as a box of the parameter's index space.

    Attributes:
        start: first index, one entry a dimension of the parameter.
        extent: elements along each dimension.
        steps: live elements from one index to the next, None where the copy has extent 1.
        address: live element of `start`.
    """

    start: Shape
    extent: Shape
    steps: tuple[int | None, ...]
    address: int


@dataclass(frozen=True)
class View:
    """A region at base + sum(index * stride), in elements of the live weights."""

    region: Region
    base: int
    stride: Shape


def to_box(
    shape: Shape, offset: int, sizes: Shape, strides: Shape, address: int, live_strides: Shape
) -> Box:
    """The box that a copy covers.

    Args:
        shape: the parameter's shape; its elements are numbered row-major.
        offset, sizes, strides: the copied region of the parameter, in elements.
        address, live_strides: the region of the live weights, of the same sizes.

    Raises NotAView when the region is no box of the parameter's index space.
    """
    place = contiguous_strides(shape)
    start = tuple((offset // place[k]) % shape[k] for k in range(len(shape)))
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    todo = [(n, s, t) for n, s, t in zip(sizes, strides, live_strides, strict=True) if n != 1]
    while todo:
        count, step, live_step = todo.pop()
        if step <= 0:
            raise NotAView("one element of it is copied to several places")
        k = next((k for k in range(len(shape)) if shape[k] > 1 and step % place[k] == 0), None)
        if k is None or step // place[k] >= shape[k]:
            raise NotAView("its elements are rearranged in a way that strides cannot express")
        stride = step // place[k]
        fits = shape[k] // stride if shape[k] % stride == 0 else count
        if count > fits and count % fits == 0:
            # The region runs over the end of this dimension into the next outer one.
            todo += [(count // fits, step * fits, live_step * fits), (fits, step, live_step)]
            continue
        pieces.setdefault(k, []).append((stride, count, live_step))
    merged = [_merge(pieces.get(k, [])) for k in range(len(shape))]
    extent = tuple(e for e, _ in merged)
    if any(s + e > n for s, e, n in zip(start, extent, shape, strict=True)):
        raise NotAView("its elements are rearranged in a way that strides cannot express")
    return Box(start, extent, tuple(step for _, step in merged), address)


def _merge(pieces: list[tuple[int, int, int]]) -> tuple[int, int | None]:
    """Extent and live step of the (stride, count, live step) pieces along one dimension."""
    extent, live_step = 1, None
    for stride, count, step in sorted(pieces):
        if stride != extent:
            raise NotAView("only every n-th element along a dimension is copied at a time")
        if live_step is None:
            live_step = step
        elif step != live_step * stride:
            raise NotAView("its elements are rearranged in a way that strides cannot express")
        extent *= count
    return extent, live_step


def solve(shape: Shape, boxes: list[Box]) -> View:
    """The view that all boxes agree on, proved to cover its region exactly once.

    Raises NotAView with the reason where there is none.
    """
    cuts = [_cuts(boxes, k) for k in range(len(shape))]
    _prove_covered_once(shape, boxes, cuts)
    base, addresses = _addresses(boxes, cuts)
    lines = [_line(boxes, k, cuts[k], addresses[k]) for k in range(len(shape))]
    base += sum(line.lowest for line in lines)
    for box in boxes:
        if box.address != base + sum(line.place(k, box) for k, line in enumerate(lines)):
            raise NotAView(_NO_STRIDES)
    region = Region(shape, tuple(line.runs for line in lines))
    contiguous = contiguous_strides(region.shape)
    strides = tuple(line.step or contiguous[k] for k, line in enumerate(lines))
    return View(region, base, strides)


def _cuts(boxes: list[Box], k: int) -> Runs:
    """The indices along a dimension that boxes have, cut wherever one begins or ends."""
    sides = {(box.start[k], box.start[k] + box.extent[k]) for box in boxes}
    edges = sorted(
        (edge, opens) for side in sides for edge, opens in zip(side, (1, -1), strict=True)
    )
    open_now = accumulate(opens for _, opens in edges)
    spans = zip(pairwise(edge for edge, _ in edges), open_now, strict=False)
    return tuple((a, b - a) for (a, b), held in spans if held and b > a)


def _prove_covered_once(shape: Shape, boxes: list[Box], cuts: list[Runs]) -> None:
    covered, total = sum(math.prod(box.extent) for box in boxes), math.prod(shape)
    starts, ends = _corners(boxes, len(shape))
    for i in range(len(boxes) - 1):
        apart = (starts[i + 1 :] >= ends[i]) | (ends[i + 1 :] <= starts[i])
        if not apart.any(axis=1).all():
            raise NotAView("some of its elements are copied to more than one place")
    # Boxes apart, of as many elements as the product of their indices, are that product.
    if not boxes or covered < math.prod(sum(count for _, count in runs) for runs in cuts):
        raise NotAView(f"only {covered} of its {total} elements are copied to the live weights")


def _corners(boxes: list[Box], dimensions: int) -> tuple[Any, Any]:
    """First indices of all boxes, and those after the last: int64 [boxes, dimensions]."""
    corners = [(box.start, box.extent) for box in boxes]
    found = np.array(corners, dtype=np.int64).reshape(len(boxes), 2, dimensions)
    return found[:, 0], found.sum(1)


def _addresses(boxes: list[Box], cuts: list[Runs]) -> tuple[int, list[list[int]]]:
    """The address of the region's first indices; how far each cut along a dimension is from it."""
    starts, ends = _corners(boxes, len(cuts))
    first = [runs[0][0] for runs in cuts]

    def address(point: list[int]) -> int:
        inside = ((starts <= point) & (point < ends)).all(1)
        box = boxes[int(inside.argmax())]
        steps = zip(point, box.start, box.steps, strict=True)
        return box.address + sum((i - start) * (step or 0) for i, start, step in steps)

    base = address(first)
    return base, [
        [address([*first[:k], start, *first[k + 1 :]]) - base for start, _ in runs]
        for k, runs in enumerate(cuts)
    ]


@dataclass(frozen=True)
class _Line:
    """The indices along one dimension, in the order in which they lie.

    Attributes:
        step: live elements from one to the next; 0 where there is only one.
        lowest: how far the first that lies is from the region's first index.
        order: index of the view by index of the parameter, of each cut.
    """

    runs: Runs
    step: int
    lowest: int
    order: dict[int, int]

    def place(self, k: int, box: Box) -> int:
        """Live elements from the first that lies to a box. Raises NotAView for one that is cut."""
        start, end = box.start[k], box.start[k] + box.extent[k]
        inside = ((cut, at) for cut, at in self.order.items() if start <= cut < end)
        if box.extent[k] > 1 and any(at - self.order[start] != cut - start for cut, at in inside):
            raise NotAView(_NO_STRIDES)
        return self.order[start] * self.step


def _line(boxes: list[Box], k: int, cuts: Runs, addresses: list[int]) -> _Line:
    lying = sorted((at, *cut) for at, cut in zip(addresses, cuts, strict=True))
    steps = {box.steps[k] for box in boxes if box.steps[k] is not None}
    if len(steps) > 1:
        raise NotAView("its pieces have different strides in the live weights")
    shown = steps.pop() if steps else None
    # Where each copy is one index wide, the distance between two neighbours is the step.
    step = shown if shown is not None else lying[1][0] - lying[0][0] if len(lying) > 1 else 0
    if step < 0:
        raise NotAView("it lies backwards in the live weights")
    if not step and sum(count for _, count in cuts) > 1:
        raise NotAView(_NO_STRIDES)
    order, before = dict[int, int](), 0
    for at, start, count in lying:
        if at != lying[0][0] + before * step:
            raise NotAView(_NO_STRIDES)
        order[start], before = before, before + count
    return _Line(tuple((start, count) for _, start, count in lying), step, lying[0][0], order)

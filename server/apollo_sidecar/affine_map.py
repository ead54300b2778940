"""Solves for the one strided view that a set of recorded copies amounts to, by exact integers.

A training parameter of shape S is cut by vLLM's loader into copies. Each copy pairs a strided
region of the parameter with a strided region of the live weights. The parameter is a view of the
live weights when there are a base and strides T with

    live address of element i  =  base + sum_k i_k * T_k      for every element i of the parameter,

and the copies cover every element exactly once. Both are proved here, not sampled: copies are
turned into boxes of index space, whose volumes must add up to the parameter's and which must not
overlap. What cannot be proved is refused with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


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
    """base + sum(index * stride), in elements of the live weights."""

    base: int
    stride: Shape


def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides of a shape, in elements."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


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
    """The view that all boxes agree on, proved to cover the shape exactly once.

    Raises NotAView with the reason where there is none.
    """
    _prove_covered_once(shape, boxes)
    steps = [_common_step(boxes, k) for k in range(len(shape))]
    base = _resolve(shape, boxes, steps)
    for box in boxes:
        offset = sum(s * t for s, t in zip(box.start, steps, strict=True) if t is not None and s)
        if base + offset != box.address:
            raise NotAView("its pieces lie at places that one set of strides cannot express")
    contiguous = contiguous_strides(shape)
    return View(base, tuple(t if t is not None else contiguous[k] for k, t in enumerate(steps)))


def _prove_covered_once(shape: Shape, boxes: list[Box]) -> None:
    covered, total = sum(math.prod(box.extent) for box in boxes), math.prod(shape)
    if covered < total:
        raise NotAView(f"only {covered} of its {total} elements are copied to the live weights")
    starts = np.array([box.start for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    ends = starts + np.array([b.extent for b in boxes], dtype=np.int64).reshape(starts.shape)
    for i in range(len(boxes) - 1):
        apart = (starts[i + 1 :] >= ends[i]) | (ends[i + 1 :] <= starts[i])
        if not apart.any(axis=1).all():
            raise NotAView("some of its elements are copied to more than one place")


def _common_step(boxes: list[Box], k: int) -> int | None:
    """The live step along dimension k where copies show one; None where each is one index wide."""
    steps = {box.steps[k] for box in boxes if box.steps[k] is not None}
    if len(steps) > 1:
        raise NotAView("its pieces have different strides in the live weights")
    return steps.pop() if steps else None


def _resolve(shape: Shape, boxes: list[Box], steps: list[int | None]) -> int:
    """Fills in the steps that only the distance between boxes tells, and returns the base.

    The boxes tile the shape, so among those that are one index wide along the unknown dimensions
    there is one at the origin and one next to it along each of them.
    """
    unknown = [k for k, step in enumerate(steps) if step is None and shape[k] > 1]
    origin: dict[Shape, int] = {}
    for box in boxes:
        known = sum(s * (steps[k] or 0) for k, s in enumerate(box.start))
        origin.setdefault(tuple(box.start[k] for k in unknown), box.address - known)
    base = origin[tuple(0 for _ in unknown)]
    for position, k in enumerate(unknown):
        neighbour = tuple(int(position == other) for other in range(len(unknown)))
        steps[k] = origin[neighbour] - base
    return base

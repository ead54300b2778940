"""Finds parameters whose rows vLLM's loader puts into another order.

The loader is run on numbers in place of values, another one for each element of the parameters in
question. Where the numbers that it writes count on along each row, each row of the live weights is
a row of the parameter. It is a view with its rows in another order when no row was written twice,
and all lie equally far apart. Nothing is sampled: every element was numbered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from apollo_grpc.region import Region
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.affine_map import NotAView, Rearranged, View
from apollo_sidecar.live_weights import LiveWeights
from apollo_sidecar.loader_trace import Elements, LoaderTrace, Numbered
from apollo_sidecar.parameter_view import parameter_view

_NUMBERS = 2**53  # That a float64 tells apart.


def numbering(roots: Iterable[pb.PlannedRoot], no_views: Mapping[str, NotAView]) -> dict[str, int]:
    """The number of its first element, for each parameter that may be rows in another order."""
    starts, end = dict[str, int](), 0
    for root in roots:
        size = math.prod(root.shape)
        if isinstance(no_views.get(root.name), Rearranged) and len(root.shape) in (1, 2):
            starts[root.name], end = end, end + size
    return starts if end <= _NUMBERS else {}


def view_in_other_order(
    root: pb.PlannedRoot, start: int, trace: LoaderTrace, live: LiveWeights
) -> pb.ParameterView:
    """The view of a parameter whose elements were numbered from `start` on.

    Raises NotAView with the reason.
    """
    numbers = range(start, start + math.prod(root.shape))
    written = [n for n in trace.numbered if int(n.first[0]) in numbers]
    if len({(n.target.storage, n.dtype) for n in written}) != 1:
        raise NotAView("its rows are not in one tensor of the live weights")
    view = rows_in_order(tuple(root.shape), start, written)
    changed = [w for w in trace.other_writes if any(_meet(w.target, n.target) for n in written)]
    if changed:
        raise NotAView(f"vLLM's loader writes something else there, too ({changed[0].operator})")
    storage, dtype = written[0].target.storage, written[0].dtype
    return parameter_view(root, view, dtype, storage, live)


def rows_in_order(shape: tuple[int, ...], start: int, written: list[Numbered]) -> View:
    """The view of the rows that were written, in the order in which they lie.

    Args:
        shape: the parameter's, of one or two dimensions.
        start: number of its first element.
        written: all of its numbers that were written, to one storage.

    Raises NotAView with the reason.
    """
    inner = {n.target.stride[1:] for n in written}
    if any(n.target.shape[1:] != shape[1:] for n in written) or len(inner) != 1:
        raise NotAView("its rows are cut in the live weights")
    width, first = math.prod(shape[1:]), torch.cat([n.first for n in written]) - start
    places = torch.cat([_places(n) for n in written]).sort()
    rows = (first // width)[places.indices]
    if bool((first % width).any()) or len(set(rows.tolist())) != len(rows):
        raise NotAView("some of its rows are not copied once to the live weights")
    steps = set(places.values.diff().tolist()) or {width}
    if len(steps) > 1 or min(steps) <= 0:
        raise NotAView("its rows lie at places that one stride cannot express")
    runs = (tuple((row, 1) for row in rows.tolist()), *(((0, size),) for size in shape[1:]))
    return View(Region(shape, runs), int(places.values[0]), (steps.pop(), *inner.pop()))


def _places(written: Numbered) -> torch.Tensor:
    """Live element of the first of each row: int64 [rows]."""
    target = written.target
    return target.offset + torch.arange(len(written.first)) * target.stride[0]


def _meet(a: Elements, b: Elements) -> bool:
    (low, high), (start, end) = a.bounds(), b.bounds()
    return a.storage == b.storage and low <= end and start <= high

"""Checks where the sidecar says that parameters lie; a view out of bounds writes anywhere."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from apollo_grpc.region import Region, reach, replicas
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.manifest import (
    DTYPES,
    MAX_ELEMENTS,
    Span,
    named,
    refusal,
    shortened,
)


@dataclass(frozen=True)
class LiveView:
    """A training parameter, or this rank's part of it; strides in elements, offset in bytes.

    Attributes:
        region: which part of the parameter it is.
        tensor: vLLM's tensor that holds it.
        rank: of the worker whose tensor that is.
    """

    name: str
    dtype: torch.dtype
    region: Region
    stride: tuple[int, ...]
    buffer_id: int
    offset_bytes: int
    tensor: str
    rank: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        return self.region.shape

    @property
    def end_bytes(self) -> int:
        """One past the last byte of the buffer that the view touches."""
        return self.offset_bytes + reach(self.shape, self.stride) * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def check_views(
    views: Sequence[pb.ParameterView],
    spans: dict[str, Span],
    expected: dict[str, tuple[int, ...]],
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, LiveView]:
    """This rank's views by name: each in bounds, writable element by element, apart from others.

    Args:
        views: the sidecar's answer, for all ranks.
        spans: of vLLM's tensors, by name; each view must lie inside the one it names.
        expected: shape of each parameter of the training model.

    Raises FailedPrecondition that names the parameter, also where the ranks' views together are
    not all of it.
    """
    checked: dict[str, LiveView] = {}
    regions = _regions(views, expected, ranks)
    for view in views:
        if view.rank == rank:
            region = regions[view.name][rank]
            checked[view.name] = _require_within(_live(view, region), spans.get(view.tensor))
    _require_disjoint(list(checked.values()))
    return checked


def views_of_others(
    views: Sequence[pb.ParameterView],
    expected: dict[str, tuple[int, ...]],
    rank: int,
    ranks: int,
) -> list[LiveView]:
    """The other ranks' views, as `check_views` takes them; their workers know their own bounds.

    Raises FailedPrecondition that names the parameter.
    """
    regions, others = _regions(views, expected, ranks), {*range(ranks)} - {rank}
    return [_live(view, regions[view.name][view.rank]) for view in views if view.rank in others]


def _regions(
    views: Sequence[pb.ParameterView], expected: dict[str, tuple[int, ...]], ranks: int
) -> dict[str, list[Region]]:
    """What each rank holds of each parameter, proved to be all of it."""
    found: dict[tuple[str, int], Region] = {}
    for view in views:
        if (view.name, view.rank) in found:
            raise refusal("MAP_INVALID", f"The sidecar maps the parameter {view.name} twice.")
        found[view.name, view.rank] = _region(view, expected.get(view.name))
    proved, refused = dict[str, list[Region]](), dict[str, str]()
    for name in expected:
        held = [found.get((name, rank)) for rank in range(ranks)]
        regions = [region for region in held if region is not None]
        if len(regions) < ranks:
            raise refusal("PARAMETER_UNMAPPED", f"The sidecar does not map the parameter {name}.")
        try:
            numbered = zip(regions, replicas(regions), strict=True)
            proved[name] = [replace(region, replica=number) for region, number in numbered]
        except ValueError as error:
            refused[name] = str(error)
    require_all_views(refused, len(expected))
    return proved


def _live(view: pb.ParameterView, region: Region) -> LiveView:
    stride = tuple(view.stride)
    if view.dtype not in DTYPES:
        raise refusal(
            "DTYPE_UNSUPPORTED",
            f"The weight {view.name} is {view.dtype}; "
            f"weights of {', '.join(DTYPES)} can be trained.",
        )
    live = LiveView(
        view.name,
        DTYPES[view.dtype],
        region,
        stride,
        view.buffer_id,
        view.offset_bytes,
        view.tensor,
        view.rank,
    )
    if not all(0 <= s < MAX_ELEMENTS for s in stride) or not 0 < live.numel < MAX_ELEMENTS:
        raise refusal("MAP_INVALID", f"The sidecar maps {view.name} with impossible strides.")
    return live


def _require_within(live: LiveView, span: Span | None) -> LiveView:
    if span is None or live.offset_bytes % live.dtype.itemsize or not _within(live, span):
        raise refusal(
            "MAP_OUT_OF_BOUNDS", f"The sidecar maps {live.name} outside the tensor it names."
        )
    if _overlaps_itself(live):
        raise refusal("MAP_OVERLAPS", f"Elements of {live.name} share memory with each other.")
    return live


def _region(view: pb.ParameterView, root: tuple[int, ...] | None) -> Region:
    """Which part of the parameter [root] it is."""
    try:
        region = Region.whole_of(root or ())
        if view.runs:
            runs = (zip(each.starts, each.counts, strict=True) for each in view.runs)
            region = Region(region.root, tuple(map(tuple, runs)))
        # An older sidecar would say so of rows that are in another order.
        same = root is not None and region.shape == tuple(view.shape) and not view.rows
    except ValueError as error:
        why = f"The sidecar maps {view.name} with an index twice, or of another model ({error})."
        raise refusal("MAP_INVALID", why) from None
    if not same or len(view.stride) != len(view.shape):
        raise refusal("MAP_INVALID", f"The sidecar maps {view.name} with a shape of another model.")
    return region


def _within(view: LiveView, span: Span) -> bool:
    here = view.buffer_id == span.buffer_id
    return here and span.start_bytes <= view.offset_bytes and view.end_bytes <= span.end_bytes


def _overlaps_itself(view: LiveView) -> bool:
    """Whether two elements may share an address; nested dimensions prove that they do not."""
    reach = 0
    for stride, count in sorted(zip(view.stride, view.shape, strict=True)):
        if count == 1:
            continue
        if stride <= reach:
            return True
        reach += (count - 1) * stride
    return False


def _require_disjoint(views: list[LiveView]) -> None:
    """Spans apart prove views apart; views whose spans interleave are refused."""
    ordered = sorted(views, key=lambda view: (view.buffer_id, view.offset_bytes))
    for before, after in pairwise(ordered):
        if before.buffer_id == after.buffer_id and after.offset_bytes < before.end_bytes:
            raise refusal(
                "MAP_OVERLAPS",
                f"The parameters {before.name} and {after.name} overlap in the live weights.",
            )


def require_all_views(refused: dict[str, str], total: int) -> None:
    """The commonest reason stands for all: a user reads one cause, and mends one at a time."""
    if not refused:
        return
    causes = Counter(refused.values())
    ((cause, _),) = causes.most_common(1)
    others = f" (one of {len(causes)} reasons)" if len(causes) > 1 else ""
    raise refusal(
        "PARAMETER_REFUSED",
        f"{len(refused)} of {total} parameters are no views of vLLM's weights, because "
        f"{shortened(cause)}{others}: {named(refused)}.",
        refused,
    )

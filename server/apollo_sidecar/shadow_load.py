"""Shadow load: learns where each training parameter lies by running vLLM's own loader.

No table per model is kept anywhere. The training server says which checkpoint tensor is which
region of which of its parameters; vLLM's `load_weights` says, through a trace, where each
checkpoint tensor would be written; what follows for each parameter is solved and proved in
`affine_map`, and in `row_order` where the loader puts rows into another order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.affine_map import Computed, NotAView, Rearranged, solve, to_box
from apollo_sidecar.kept_module import kept_module
from apollo_sidecar.live_weights import LiveTensor, LiveWeights
from apollo_sidecar.loader_trace import Copy, LoaderTrace, OtherWrite
from apollo_sidecar.parameter_view import parameter_view
from apollo_sidecar.row_order import numbering, view_in_other_order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Trace:
    copies: dict[str, list[Copy]]
    trace: LoaderTrace
    positions: dict[int, int]
    storages: dict[str, int]


def trace_checkpoint_map(
    model: Any, live: LiveWeights, request: pb.TraceCheckpointMapRequest
) -> pb.TraceCheckpointMapResponse:
    """Where each root of the request lies in the live weights, or why it is no view of them.

    The live weights are read by no one and written by no one here. Must run on the worker's own
    thread, between forwards: `load_weights` walks the module.
    """
    response = pb.TraceCheckpointMapResponse(epoch=request.epoch)
    try:
        recorded = _run_loader(model, live, request)
    except Exception as error:
        reason = f"vLLM's loader failed on the model's own tensors: {type(error).__name__}: {error}"
        for root in request.roots:
            response.refused.add(name=root.name, reason=reason)
        return response
    no_views: dict[str, NotAView] = {}
    for root in request.roots:
        try:
            response.views.append(_view_of(root, recorded, live))
        except NotAView as error:
            no_views[root.name] = error
    if starts := numbering(request.roots, no_views):
        response.views.extend(_views_in_other_orders(model, live, request, starts, no_views))
    for name, why in no_views.items():
        response.refused.add(name=name, reason=str(why), computed=isinstance(why, Computed))
    return response


def _views_in_other_orders(
    model: Any,
    live: LiveWeights,
    request: pb.TraceCheckpointMapRequest,
    starts: Mapping[str, int],
    no_views: dict[str, NotAView],
) -> Iterator[pb.ParameterView]:
    """Those of the numbered parameters that are views after all; they leave `no_views`."""
    try:
        trace, _ = _load(model, live, request, starts)
    except Exception as error:
        # What a loader makes of numbers decides nothing: each is refused for what it was.
        log.info("vLLM's loader does not load numbers: %s: %s", type(error).__name__, error)
        return
    for root in request.roots:
        if root.name not in starts:
            continue
        try:
            yield view_in_other_order(root, starts[root.name], trace, live)
        except NotAView as error:
            log.info("%s: %s", root.name, error)
            continue
        del no_views[root.name]


def _run_loader(model: Any, live: LiveWeights, request: pb.TraceCheckpointMapRequest) -> _Trace:
    trace, sources = _load(model, live, request, {})
    storages = {name: source.untyped_storage()._cdata for name, source in sources.items()}
    name_of = {storage: name for name, storage in storages.items()}
    copies: dict[str, list[Copy]] = {}
    positions = {id(copy): position for position, copy in enumerate(trace.copies)}
    for copy in trace.copies:
        copies.setdefault(name_of[copy.source.storage], []).append(copy)
    return _Trace(copies, trace, positions, storages)


def _load(
    model: Any, live: LiveWeights, request: pb.TraceCheckpointMapRequest, starts: Mapping[str, int]
) -> tuple[LoaderTrace, dict[str, torch.Tensor]]:
    """The loader's trace, of meta tensors, and of numbers for the roots that have a start."""
    # In the live dtype a loader's casts are no-ops, so every copy keeps its address.
    dtype = _main_dtype(live.tensors)
    with torch.device("meta"):
        sources = {r.name: torch.empty(math.prod(r.shape), dtype=dtype) for r in request.roots}
    trace = LoaderTrace(live.storages, sources.values())
    with kept_module(model), torch.no_grad(), trace:
        model.load_weights(_planned_tensors(request, sources, starts))
    return trace, sources


def _planned_tensors(
    request: pb.TraceCheckpointMapRequest,
    sources: dict[str, torch.Tensor],
    starts: Mapping[str, int],
) -> Iterator[tuple[str, torch.Tensor]]:
    for planned in request.tensors:
        source = sources[planned.root]
        if (start := starts.get(planned.root)) is not None:
            # Of one parameter at a time: they take twice the memory of its weights in float32.
            source = torch.arange(start, start + len(source), dtype=torch.float64, device="cpu")
        yield (
            planned.checkpoint_name,
            source.as_strided(tuple(planned.shape), tuple(planned.stride), planned.offset),
        )


def _main_dtype(tensors: list[LiveTensor]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _view_of(root: pb.PlannedRoot, recorded: _Trace, live: LiveWeights) -> pb.ParameterView:
    shape = tuple(root.shape)
    copies = [c for c in recorded.copies.get(root.name, ()) if math.prod(c.target.shape)]
    if not copies:
        raise _why_not_copied(recorded.storages[root.name], recorded.trace)
    dtypes = {copy.dtype for copy in copies}
    if len(dtypes) > 1:
        raise NotAView("its parts have different dtypes in the live weights")
    boxes = [
        to_box(
            shape,
            c.source.offset,
            c.source.shape,
            c.source.stride,
            c.target.offset,
            c.target.stride,
        )
        for c in copies
    ]
    storages = {copy.target.storage for copy in copies}
    if len(storages) > 1:
        raise NotAView("it is spread over several tensors of the live weights")
    found = parameter_view(root, solve(shape, boxes), dtypes.pop(), storages.pop(), live)
    _refuse_later_writes(copies, recorded)
    return found


def _why_not_copied(source: int, trace: LoaderTrace) -> NotAView:
    if source in trace.rearranged:
        return Rearranged(
            "vLLM's loader rearranges its elements in a way that strides cannot express"
        )
    if any(source in write.origins for write in trace.other_writes):
        return Computed("vLLM's loader writes values that it computes or puts together from it")
    return NotAView("vLLM's loader copies no part of it")


def _refuse_later_writes(copies: list[Copy], recorded: _Trace) -> None:
    """Refuses a parameter that the loader computes something into after copying it."""
    first_copy = min(recorded.positions[id(copy)] for copy in copies)
    later = [w for w in recorded.trace.other_writes if w.copies_before > first_copy]
    found = [[write for write in later if _touches(write, copy)] for copy in copies]
    if not any(found):
        return
    operator = next(write.operator for writes in found for write in writes)
    whole = all(
        any(_covers(write, copy) for write in writes)
        for copy, writes in zip(copies, found, strict=True)
    )
    kind = Computed if whole else NotAView
    raise kind(f"vLLM's loader changes it after the copy ({operator})")


def _touches(write: OtherWrite, copy: Copy) -> bool:
    (low, high), (start, end) = _byte_range(write), _byte_range(copy)
    return copy.target.storage == write.target.storage and low < end and start < high


def _covers(write: OtherWrite, copy: Copy) -> bool:
    """Whether it writes every byte of a range that all of the copy lies in."""
    (low, high), (start, end) = _byte_range(write), _byte_range(copy)
    dense = math.prod(write.target.shape) * write.dtype.itemsize == high - low
    return dense and low <= start and end <= high


def _byte_range(written: Copy | OtherWrite) -> tuple[int, int]:
    """First byte of the storage that is written, and one past the last."""
    low, high = written.target.bounds()
    return low * written.dtype.itemsize, (high + 1) * written.dtype.itemsize

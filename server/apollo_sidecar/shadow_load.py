"""Shadow load: learns where each training parameter lies by running vLLM's own loader.

No table per model is kept anywhere. The training server says which checkpoint tensor is which
region of which of its parameters; vLLM's `load_weights` says, through a trace, where each
checkpoint tensor would be written; what follows for each parameter is solved and proved in
`affine_map`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from apollo_grpc.v1 import weight_export_pb2 as pb
from apollo_sidecar.affine_map import NotAView, View, solve, to_box
from apollo_sidecar.kept_module import kept_module
from apollo_sidecar.live_weights import LiveTensor, LiveWeights
from apollo_sidecar.loader_trace import Copy, LoaderTrace


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
    for root in request.roots:
        try:
            response.views.append(_view_of(root, recorded, live))
        except NotAView as error:
            response.refused.add(name=root.name, reason=str(error))
    return response


def _run_loader(model: Any, live: LiveWeights, request: pb.TraceCheckpointMapRequest) -> _Trace:
    # In the live dtype a loader's casts are no-ops, so every copy keeps its address.
    dtype = _main_dtype(live.tensors)
    with torch.device("meta"):
        sources = {r.name: torch.empty(math.prod(r.shape), dtype=dtype) for r in request.roots}
    trace = LoaderTrace(live.storages, sources.values())
    with kept_module(model), torch.no_grad(), trace:
        model.load_weights(_planned_tensors(request, sources))
    storages = {name: source.untyped_storage()._cdata for name, source in sources.items()}
    name_of = {storage: name for name, storage in storages.items()}
    copies: dict[str, list[Copy]] = {}
    positions = {id(copy): position for position, copy in enumerate(trace.copies)}
    for copy in trace.copies:
        copies.setdefault(name_of[copy.source.storage], []).append(copy)
    return _Trace(copies, trace, positions, storages)


def _planned_tensors(
    request: pb.TraceCheckpointMapRequest, sources: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for planned in request.tensors:
        source = sources[planned.root]
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
        raise NotAView(_why_not_copied(recorded.storages[root.name], recorded.trace))
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
    buffer_id = live.buffer_id(storages.pop())
    view = solve(shape, boxes)
    dtype = dtypes.pop()
    held = [tensor for tensor in live.tensors if tensor.buffer_id == buffer_id]
    owner = _owner(held, shape, view, dtype)
    _refuse_later_writes(copies, recorded)
    return pb.ParameterView(
        name=root.name,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        stride=view.stride,
        buffer_id=buffer_id,
        offset_bytes=view.base * dtype.itemsize,
        tensor=owner.name,
    )


def _why_not_copied(source: int, trace: LoaderTrace) -> str:
    if source in trace.rearranged:
        return "vLLM's loader rearranges its elements in a way that strides cannot express"
    if any(source in write.origins for write in trace.other_writes):
        return "vLLM's loader writes values that it computes or puts together from it"
    return "vLLM's loader copies no part of it"


def _owner(
    held: list[LiveTensor], shape: tuple[int, ...], view: View, dtype: torch.dtype
) -> LiveTensor:
    """The one live tensor, of those in the view's buffer, that holds the whole of it."""
    if any(s < 0 for s in view.stride):
        raise NotAView("it lies backwards in the live weights")
    last = view.base + sum((n - 1) * s for n, s in zip(shape, view.stride, strict=True))
    first_byte, end_byte = view.base * dtype.itemsize, (last + 1) * dtype.itemsize
    for tensor in held:
        if tensor.offset_bytes <= first_byte and end_byte <= tensor.end_bytes:
            return tensor
    raise NotAView("it is spread over several tensors of the live weights")


def _refuse_later_writes(copies: list[Copy], recorded: _Trace) -> None:
    """Refuses a parameter that the loader computes something into after copying it."""
    first_copy = min(recorded.positions[id(copy)] for copy in copies)
    for write in recorded.trace.other_writes:
        if write.copies_before <= first_copy:
            continue
        low, high = _byte_bounds(write.target.bounds(), write.dtype)
        for copy in copies:
            start, end = _byte_bounds(copy.target.bounds(), copy.dtype)
            if copy.target.storage == write.target.storage and low < end and start < high:
                raise NotAView(f"vLLM's loader changes it after the copy ({write.operator})")


def _byte_bounds(bounds: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    return bounds[0] * dtype.itemsize, (bounds[1] + 1) * dtype.itemsize

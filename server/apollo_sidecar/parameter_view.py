"""A solved view as the training server is told of it: where, and in which of vLLM's tensors."""

from __future__ import annotations

import torch

from apollo_grpc.region import reach
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.affine_map import NotAView, View
from apollo_sidecar.live_weights import LiveTensor, LiveWeights


def parameter_view(
    root: pb.PlannedRoot,
    view: View,
    dtype: torch.dtype,
    storage: int,
    live: LiveWeights,
) -> pb.ParameterView:
    """The answer for a parameter.

    Args:
        storage: of the live weights that the view is of.

    Raises NotAView where no live tensor holds the whole of it.
    """
    buffer_id = live.buffer_id(storage)
    held = [tensor for tensor in live.tensors if tensor.buffer_id == buffer_id]
    found = pb.ParameterView(
        name=root.name,
        dtype=str(dtype).removeprefix("torch."),
        shape=view.region.shape,
        stride=view.stride,
        buffer_id=buffer_id,
        offset_bytes=view.base * dtype.itemsize,
        tensor=_owner(held, view, dtype).name,
    )
    for runs in () if view.region.whole else view.region.runs:
        starts, counts = zip(*runs, strict=True)
        found.runs.add(starts=starts, counts=counts)
    return found


def _owner(held: list[LiveTensor], view: View, dtype: torch.dtype) -> LiveTensor:
    """The one live tensor, of those in the view's buffer, that holds the whole of it."""
    if any(s < 0 for s in view.stride):
        raise NotAView("it lies backwards in the live weights")
    end = view.base + reach(view.region.shape, view.stride)
    first_byte, end_byte = view.base * dtype.itemsize, end * dtype.itemsize
    for tensor in held:
        if tensor.offset_bytes <= first_byte and end_byte <= tensor.end_bytes:
            return tensor
    raise NotAView("it is spread over several tensors of the live weights")

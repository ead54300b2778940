"""A solved view as the training server is told of it: where, and in which of vLLM's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.affine_map import NotAView, View
from apollo_sidecar.live_weights import LiveTensor, LiveWeights


def parameter_view(
    root: pb.PlannedRoot,
    view: View,
    dtype: torch.dtype,
    storage: int,
    live: LiveWeights,
    rows: Sequence[int] = (),
) -> pb.ParameterView:
    """The answer for a parameter.

    Args:
        storage: of the live weights that the view is of.
        rows: which row of the parameter each of the view's is; empty where they are in order.

    Raises NotAView where no live tensor holds the whole of it.
    """
    shape, buffer_id = tuple(root.shape), live.buffer_id(storage)
    held = [tensor for tensor in live.tensors if tensor.buffer_id == buffer_id]
    owner = _owner(held, shape, view, dtype)
    return pb.ParameterView(
        name=root.name,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        stride=view.stride,
        buffer_id=buffer_id,
        offset_bytes=view.base * dtype.itemsize,
        tensor=owner.name,
        rows=rows,
    )


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

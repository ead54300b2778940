"""Checks what the sidecar says before anything is mapped.

A wrong manifest is refused as a whole: a view out of bounds writes into someone else's memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import weight_export_pb2 as pb

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
MAX_ELEMENTS = 2**48


@dataclass(frozen=True)
class LiveView:
    """A training parameter within a buffer; strides in elements, offset in bytes.

    Attributes:
        tensor: vLLM's tensor that holds it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    buffer_id: int
    offset_bytes: int
    tensor: str

    @property
    def end_bytes(self) -> int:
        """One past the last byte of the buffer that the view touches."""
        span = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        return self.offset_bytes + span * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def refusal(reason: str, message: str) -> FailedPrecondition:
    """The error that keeps a model from being trained; nothing was written."""
    return FailedPrecondition(f"{message} Nothing was written.", reason=reason)


def check_manifest(manifest: pb.WeightManifest) -> None:
    """Raises FailedPrecondition where a manifest is not one that this version can map."""
    if not manifest.epoch:
        raise refusal("MANIFEST_INVALID", "The sidecar's manifest has no epoch.")
    if manifest.tensor_parallel_size != 1:
        raise refusal(
            "TENSOR_PARALLEL_UNSUPPORTED",
            f"vLLM runs with tensor parallel size {manifest.tensor_parallel_size}; this version "
            "trains models on one worker. Serve with --tensor-parallel-size 1.",
        )
    ids = [buffer.buffer_id for buffer in manifest.buffers]
    if not ids or len(set(ids)) != len(ids):
        raise refusal("MANIFEST_INVALID", "The sidecar's manifest names no buffers, or one twice.")
    for buffer in manifest.buffers:
        if buffer.WhichOneof("handle") != "memfd":
            raise refusal(
                "BUFFER_UNSUPPORTED",
                "vLLM exports weights on a GPU; this version maps CPU weights only.",
            )
        if buffer.size_bytes <= 0:
            raise refusal("MANIFEST_INVALID", "The sidecar's manifest has a buffer without size.")


def check_views(
    views: list[pb.ParameterView], sizes: dict[int, int], expected: dict[str, tuple[int, ...]]
) -> dict[str, LiveView]:
    """The views by name, each in bounds, writable element by element, and apart from the others.

    Args:
        views: the sidecar's answer.
        sizes: bytes of each buffer.
        expected: shape of each parameter of the training model.

    Raises FailedPrecondition that names the parameter.
    """
    checked: dict[str, LiveView] = {}
    for view in views:
        live = _check_view(view, sizes, expected)
        if live.name in checked:
            raise refusal("MAP_INVALID", f"The sidecar maps the parameter {live.name} twice.")
        checked[live.name] = live
    for name in expected:
        if name not in checked:
            raise refusal("PARAMETER_UNMAPPED", f"The sidecar does not map the parameter {name}.")
    _require_disjoint(list(checked.values()))
    return checked


def _check_view(
    view: pb.ParameterView, sizes: dict[int, int], expected: dict[str, tuple[int, ...]]
) -> LiveView:
    shape, stride = tuple(view.shape), tuple(view.stride)
    if expected.get(view.name) != shape or len(stride) != len(shape):
        raise refusal("MAP_INVALID", f"The sidecar maps {view.name} with a shape of another model.")
    if view.dtype not in DTYPES:
        raise refusal(
            "DTYPE_UNSUPPORTED",
            f"The weight {view.name} is {view.dtype}; "
            f"weights of {', '.join(DTYPES)} can be trained.",
        )
    live = LiveView(
        view.name, DTYPES[view.dtype], shape, stride, view.buffer_id, view.offset_bytes, view.tensor
    )
    size = sizes.get(live.buffer_id, 0)
    if not all(0 <= s < MAX_ELEMENTS for s in stride) or not 0 < live.numel < MAX_ELEMENTS:
        raise refusal("MAP_INVALID", f"The sidecar maps {view.name} with impossible strides.")
    if live.offset_bytes < 0 or live.offset_bytes % live.dtype.itemsize or live.end_bytes > size:
        raise refusal("MAP_OUT_OF_BOUNDS", f"The sidecar maps {view.name} outside its buffer.")
    if _overlaps_itself(live):
        raise refusal("MAP_OVERLAPS", f"Elements of {view.name} share memory with each other.")
    return live


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

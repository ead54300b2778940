"""Checks what the sidecar says before anything is mapped.

A wrong manifest is refused as a whole: a view out of bounds writes into someone else's memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
MAX_ELEMENTS = 2**48
MAX_NAMED = 3
MAX_CAUSE = 200


@dataclass(frozen=True)
class LiveView:
    """A training parameter within a buffer; strides in elements, offset in bytes.

    Attributes:
        tensor: vLLM's tensor that holds it.
        rows: which row of the parameter each of the view's is; empty where they are in order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    buffer_id: int
    offset_bytes: int
    tensor: str
    rows: tuple[int, ...] = ()

    @property
    def end_bytes(self) -> int:
        """One past the last byte of the buffer that the view touches."""
        span = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        return self.offset_bytes + span * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Region(NamedTuple):
    """The bytes of a buffer that one of vLLM's tensors spans."""

    buffer_id: int
    start_bytes: int
    end_bytes: int
    alias_group: int


class Refusal(FailedPrecondition):
    """What keeps a model from being trained; nothing was written.

    Attributes:
        tensors: all that it is about, by name, each with its reason; the message names a few.
    """

    def __init__(self, message: str, reason: str, tensors: Mapping[str, str]):
        super().__init__(message, reason=reason)
        self.tensors = dict(tensors)


def refusal(
    reason: str, message: str, tensors: Mapping[str, str] = MappingProxyType({})
) -> Refusal:
    """The error that keeps a model from being trained.

    Args:
        message: the cause and what to do, in a sentence each; of `tensors` it holds `named`.
        tensors: as `Refusal` has them.
    """
    return Refusal(f"{message} Nothing was written.", reason, tensors)


def named(names: Collection[str]) -> str:
    """Three of these names at most, and how many more there are, and where."""
    first = ", ".join(list(names)[:MAX_NAMED])
    more = len(names) - MAX_NAMED
    if more <= 0:
        return first
    return f"{first} and {more} more (the server's log and `apollo doctor --json` have all)"


def shortened(cause: str) -> str:
    """The first sentence of a cause that others worded, cut where it is a long one."""
    sentence = cause.partition("\n")[0].partition(". ")[0].rstrip(".")
    return sentence if len(sentence) <= MAX_CAUSE else f"{sentence[: MAX_CAUSE - 3]}..."


def check_manifest(manifest: pb.WeightManifest, epoch: str) -> dict[str, Region]:
    """Where each tensor of vLLM's lies, in a manifest that this version can map.

    Args:
        epoch: of the engine process that was found.

    Raises FailedPrecondition for a manifest of another process, or one that contradicts itself.
    """
    if not manifest.epoch or manifest.epoch != epoch:
        raise refusal("EPOCH_CHANGED", "The sidecar's manifest is of another engine process.")
    if manifest.tensor_parallel_size != 1:
        raise refusal(
            "TENSOR_PARALLEL_UNSUPPORTED",
            f"vLLM runs with tensor parallel size {manifest.tensor_parallel_size}; this version "
            "trains models on one worker. Serve with --tensor-parallel-size 1.",
        )
    ids = [buffer.buffer_id for buffer in manifest.buffers]
    if not ids or len(set(ids)) != len(ids):
        raise _invalid("names no buffers, or one twice")
    for buffer in manifest.buffers:
        _check_buffer(buffer)
    if len({buffer.cuda_ipc.device_uuid for buffer in manifest.buffers}) != 1:
        raise _invalid("names buffers on several devices")
    sizes = {buffer.buffer_id: buffer.size_bytes for buffer in manifest.buffers}
    regions = {tensor.name: _region(tensor, sizes) for tensor in manifest.tensors}
    if not regions or len(regions) != len(manifest.tensors):
        raise _invalid("names no tensors, or one twice")
    _require_apart(list(regions.values()))
    return regions


def _invalid(what: str) -> FailedPrecondition:
    return refusal("MANIFEST_INVALID", f"The sidecar's manifest {what}.")


def _check_buffer(buffer: pb.Buffer) -> None:
    if not 0 < buffer.size_bytes < MAX_ELEMENTS:
        raise _invalid("has a buffer without a possible size")
    kind = buffer.WhichOneof("handle")
    if kind is None:
        raise _invalid("has a buffer without a handle")
    if kind == "cuda_ipc":
        handle = buffer.cuda_ipc
        complete = handle.device_uuid and handle.handle and handle.reference_counter_handle
        if not complete or handle.offset_bytes < 0:
            raise _invalid("has an incomplete handle of GPU memory")


def _region(tensor: pb.Tensor, sizes: dict[int, int]) -> Region:
    dtype = getattr(torch, tensor.dtype, None)
    sides = zip(tensor.shape, tensor.stride, strict=False)
    if not isinstance(dtype, torch.dtype) or len(tensor.shape) != len(tensor.stride):
        raise _invalid(f"describes {tensor.name} by no dtype, or shape and strides of two tensors")
    if any(n <= 0 or not 0 <= s < MAX_ELEMENTS for n, s in sides):
        raise _invalid(f"has impossible strides for {tensor.name}")
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True)) + 1
    end = tensor.offset_bytes + reach * dtype.itemsize
    if tensor.offset_bytes < 0 or end > sizes.get(tensor.buffer_id, 0):
        raise _invalid(f"puts {tensor.name} outside its buffer")
    return Region(tensor.buffer_id, tensor.offset_bytes, end, tensor.alias_group)


def _require_apart(regions: list[Region]) -> None:
    """Tensors may share bytes only with those of their alias group."""
    here, reach, group = -1, 0, -1
    for region in sorted(regions):
        overlaps = region.buffer_id == here and region.start_bytes < reach
        if overlaps and region.alias_group != group:
            raise _invalid("has tensors that overlap")
        reach = max(reach, region.end_bytes) if overlaps else region.end_bytes
        here, group = region.buffer_id, region.alias_group


def check_views(
    views: list[pb.ParameterView],
    regions: dict[str, Region],
    expected: dict[str, tuple[int, ...]],
) -> dict[str, LiveView]:
    """The views by name, each in bounds, writable element by element, and apart from the others.

    Args:
        views: the sidecar's answer.
        regions: of vLLM's tensors, by name; each view must lie inside the one it names.
        expected: shape of each parameter of the training model.

    Raises FailedPrecondition that names the parameter.
    """
    checked: dict[str, LiveView] = {}
    for view in views:
        live = _check_view(view, regions.get(view.tensor), expected)
        if live.name in checked:
            raise refusal("MAP_INVALID", f"The sidecar maps the parameter {live.name} twice.")
        checked[live.name] = live
    for name in expected:
        if name not in checked:
            raise refusal("PARAMETER_UNMAPPED", f"The sidecar does not map the parameter {name}.")
    _require_disjoint(list(checked.values()))
    return checked


def _check_view(
    view: pb.ParameterView, region: Region | None, expected: dict[str, tuple[int, ...]]
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
        view.name,
        DTYPES[view.dtype],
        shape,
        stride,
        view.buffer_id,
        view.offset_bytes,
        view.tensor,
        tuple(view.rows),
    )
    if live.rows and (not shape or sorted(live.rows) != list(range(shape[0]))):
        raise refusal("MAP_INVALID", f"The sidecar maps a row of {view.name} twice, or not at all.")
    if not all(0 <= s < MAX_ELEMENTS for s in stride) or not 0 < live.numel < MAX_ELEMENTS:
        raise refusal("MAP_INVALID", f"The sidecar maps {view.name} with impossible strides.")
    if region is None or live.offset_bytes % live.dtype.itemsize or not _within(live, region):
        raise refusal(
            "MAP_OUT_OF_BOUNDS", f"The sidecar maps {view.name} outside the tensor it names."
        )
    if _overlaps_itself(live):
        raise refusal("MAP_OVERLAPS", f"Elements of {view.name} share memory with each other.")
    return live


def _within(view: LiveView, region: Region) -> bool:
    here = view.buffer_id == region.buffer_id
    return here and region.start_bytes <= view.offset_bytes and view.end_bytes <= region.end_bytes


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

"""Checks what the sidecar says before anything is mapped.

A wrong manifest is refused as a whole: a view out of bounds writes into someone else's memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.region import reach
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.parallel.ranks import ALONE, Ranks

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
MAX_ELEMENTS = 2**48
MAX_NAMED = 3
MAX_CAUSE = 200


class Span(NamedTuple):
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


def check_manifest(
    manifest: pb.WeightManifest, epoch: str, ranks: Ranks = ALONE
) -> dict[str, Span]:
    """Where each tensor of vLLM's lies, in a manifest that this version can map.

    Args:
        epoch: of the engine process that was found.
        ranks: of which this one maps the memory of the worker of its rank.

    Raises FailedPrecondition for a manifest of another process, or one that contradicts itself.
    """
    if not manifest.epoch or manifest.epoch != epoch:
        raise refusal("EPOCH_CHANGED", "The sidecar's manifest is of another engine process.")
    if (manifest.tensor_parallel_rank, manifest.tensor_parallel_size) != (ranks.rank, ranks.size):
        raise refusal(
            "TENSOR_PARALLEL_UNSUPPORTED",
            f"vLLM runs with tensor parallel size {manifest.tensor_parallel_size}, and trainer "
            f"rank {ranks.rank} of {ranks.size} has none of its workers. Serve with "
            "--tensor-parallel-size 1.",
        )
    ids = [buffer.buffer_id for buffer in manifest.buffers]
    if not ids or len(set(ids)) != len(ids):
        raise _invalid("names no buffers, or one twice")
    for buffer in manifest.buffers:
        _check_buffer(buffer)
    if len({buffer.cuda_ipc.device_uuid for buffer in manifest.buffers}) != 1:
        raise _invalid("names buffers on several devices")
    sizes = {buffer.buffer_id: buffer.size_bytes for buffer in manifest.buffers}
    spans = {tensor.name: _span(tensor, sizes) for tensor in manifest.tensors}
    if not spans or len(spans) != len(manifest.tensors):
        raise _invalid("names no tensors, or one twice")
    _require_apart(list(spans.values()))
    return spans


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


def _span(tensor: pb.Tensor, sizes: dict[int, int]) -> Span:
    dtype = getattr(torch, tensor.dtype, None)
    sides = zip(tensor.shape, tensor.stride, strict=False)
    if not isinstance(dtype, torch.dtype) or len(tensor.shape) != len(tensor.stride):
        raise _invalid(f"describes {tensor.name} by no dtype, or shape and strides of two tensors")
    if any(n <= 0 or not 0 <= s < MAX_ELEMENTS for n, s in sides):
        raise _invalid(f"has impossible strides for {tensor.name}")
    end = tensor.offset_bytes + reach(tensor.shape, tensor.stride) * dtype.itemsize
    if tensor.offset_bytes < 0 or end > sizes.get(tensor.buffer_id, 0):
        raise _invalid(f"puts {tensor.name} outside its buffer")
    return Span(tensor.buffer_id, tensor.offset_bytes, end, tensor.alias_group)


def _require_apart(spans: list[Span]) -> None:
    """Tensors may share bytes only with those of their alias group."""
    here, end, group = -1, 0, -1
    for span in sorted(spans):
        overlaps = span.buffer_id == here and span.start_bytes < end
        if overlaps and span.alias_group != group:
            raise _invalid("has tensors that overlap")
        end = max(end, span.end_bytes) if overlaps else span.end_bytes
        here, group = span.buffer_id, span.alias_group

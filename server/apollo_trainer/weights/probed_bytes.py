"""Which bytes of a parameter a probe changes: few, in runs, and such that the scores depend on."""

from __future__ import annotations

import math
import random
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.live_view import LiveView
from apollo_trainer.weights.mapping import Mapping

SEED = 20412
# Of a tensor of zeros, whose values are no measure.
LEAST_DEVIATION = 0.02


class RowsRead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers which rows of embedding tables a forward pass reads; no others move its scores.

    Attributes:
        rows: by the address of the table.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: dict[int, set[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.rows.setdefault(args[0].data_ptr(), set()).update(args[1].flatten().tolist())
        return func(*args, **(kwargs or {}))


def change_of(
    view: LiveView, parameter: torch.Tensor, rows: int, deviation: float, read: set[int]
) -> pb.WeightChange:
    """Noise in some rows of a parameter, or in all of those that were read of a table.

    Args:
        parameter: its values, or those of another rank's part of it.
        rows: how many of a matrix; a quarter of that of each in a stack of them, as experts are.
        deviation: of the noise, in units of the parameter's values.
    """
    draw = random.Random(f"{SEED}/{view.name}/{rows}")
    size = float(parameter.detach()[:8].float().square().mean().sqrt())
    starts, elements = _runs(view, rows, draw, sorted(read))
    return pb.WeightChange(
        tensor=view.tensor,
        offset_bytes=starts,
        elements=elements,
        deviation=deviation * max(size, LEAST_DEVIATION),
        seed=draw.getrandbits(31),
        rank=view.rank,
    )


def _runs(view: LiveView, rows: int, draw: random.Random, read: list[int]) -> tuple[list[int], int]:
    """Where in its buffer each run begins, in bytes, and the elements of a run."""
    if not view.shape:
        return [view.offset_bytes], 1
    inner, width = _run_axis(view), view.dtype.itemsize
    outer = [axis for axis in range(len(view.shape)) if axis != inner]
    chosen = _indices([view.shape[axis] for axis in outer], rows, draw)
    if read and outer == [0]:
        chosen = [(row,) for row in read]
    strides = [view.stride[axis] * width for axis in outer]
    starts = [
        view.offset_bytes + sum(i * stride for i, stride in zip(index, strides, strict=True))
        for index in chosen
    ]
    elements, step = view.shape[inner], view.stride[inner] * width
    if step == width:
        return starts, elements
    return [start + i * step for start in starts for i in range(elements)], 1


def _run_axis(view: LiveView) -> int:
    """The axis along which elements lie closest; a run of them is contiguous in most layouts."""
    axes = [axis for axis, size in enumerate(view.shape) if size > 1] or [0]
    return min(axes, key=lambda axis: view.stride[axis])


def _indices(sizes: list[int], rows: int, draw: random.Random) -> list[tuple[int, ...]]:
    """So many seeded indices; of several axes, a quarter of them for each index of the first."""
    if len(sizes) < 2:
        total = math.prod(sizes)
        some = draw.sample(range(total), min(rows, total))
        return [(i,) for i in some] if sizes else [()]
    inner = _indices(sizes[1:], max(1, rows // 4), draw)
    return [(first, *rest) for first, rest in product(range(sizes[0]), inner)]


def read_bytes(mapping: Mapping, dtype: torch.dtype, change: pb.WeightChange) -> torch.Tensor:
    """A copy of the elements that a change names, as they are now, on the CPU.

    It waits for the device: the bytes may be changed right after by another process.
    """
    flat = torch.empty(0, dtype=dtype, device=mapping.storage.device)
    flat.set_(mapping.storage, 0, (mapping.size_bytes // dtype.itemsize,), (1,))
    starts = torch.tensor(list(change.offset_bytes), device=flat.device) // dtype.itemsize
    return flat[starts[:, None] + torch.arange(change.elements, device=flat.device)].cpu()

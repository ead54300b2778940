"""Which checkpoint tensor is which region of which parameter of the transformers model.

Made by transformers itself: `revert_weight_conversion` is what `save_pretrained` uses to go from a
model's parameters to checkpoint names. It runs on meta tensors here, and what it returns still
says, by storage, offset and stride, which parameter it was cut from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.core_model_loading import revert_weight_conversion

from apollo_grpc.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.manifest import refusal


@dataclass(frozen=True)
class CheckpointTensor:
    """A checkpoint tensor as elements offset + sum(index * stride) of a parameter, row-major."""

    name: str
    root: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class CheckpointPlan:
    """All parameters of a model, and the checkpoint tensors that make them.

    Attributes:
        roots: shape of each parameter, tied ones once.
        tied: second name of a parameter to its first.
        fixed: checkpoint name of each persistent buffer to the buffer's; those are not trained.
    """

    roots: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    tensors: tuple[CheckpointTensor, ...]
    fixed: dict[str, str] = field(default_factory=dict)

    def request(self, epoch: str) -> pb.TraceCheckpointMapRequest:
        """The plan for the sidecar."""
        request = pb.TraceCheckpointMapRequest(epoch=epoch)
        for name, shape in self.roots.items():
            request.roots.add(name=name, shape=shape)
        for tensor in self.tensors:
            request.tensors.add(
                checkpoint_name=tensor.name,
                root=tensor.root,
                shape=tensor.shape,
                stride=tensor.stride,
                offset=tensor.offset,
            )
        return request

    def read(self, tensor: CheckpointTensor, parameter: torch.Tensor) -> torch.Tensor:
        """A checkpoint tensor's values out of its parameter; a copy where the layout differs."""
        flat = parameter.detach().contiguous().view(-1)
        # as_strided counts from the start of the storage, which is that of all live weights.
        start = int(flat.storage_offset()) + tensor.offset
        return flat.as_strided(tensor.shape, tensor.stride, start).contiguous()


class _CopiesAsViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps copies of meta tensors as views of their source, so that the address is not lost."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name in ("aten::clone", "aten::_to_copy", "aten::contiguous"):
            return torch.ops.aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))


def plan_checkpoint(model: Any) -> CheckpointPlan:
    """The plan of a transformers model whose parameters are on the meta device.

    Raises FailedPrecondition where a checkpoint tensor is computed from several parameters.
    """
    roots: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_name.setdefault(parameter.untyped_storage()._cdata, name)
        if first == name:
            roots[name] = parameter.detach()
        else:
            tied[name] = first
    buffers = persistent_buffers(model)
    buffer_name = {b.untyped_storage()._cdata: name for name, b in buffers.items()}
    with torch.no_grad(), _CopiesAsViews():  # type: ignore[no-untyped-call]
        checkpoint: dict[str, torch.Tensor] = revert_weight_conversion(model, roots | buffers)
    named = {name: buffer_name.get(t.untyped_storage()._cdata) for name, t in checkpoint.items()}
    tensors = tuple(
        _planned(name, tensor, first_name)
        for name, tensor in sorted(checkpoint.items())
        if not named[name]
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in roots.items()}
    fixed = {name: buffer for name, buffer in named.items() if buffer}
    return CheckpointPlan(shapes, tied, tensors, fixed)


def persistent_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Buffers that a checkpoint holds, by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _planned(name: str, tensor: torch.Tensor, root_of: dict[int, str]) -> CheckpointTensor:
    root = root_of.get(tensor.untyped_storage()._cdata)
    if root is None:
        raise refusal(
            "CHECKPOINT_COMPUTED",
            f"transformers computes the checkpoint tensor {name} from several parameters.",
        )
    offset = int(tensor.storage_offset())
    return CheckpointTensor(name, root, tuple(tensor.shape), tuple(tensor.stride()), offset)

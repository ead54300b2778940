"""Which checkpoint tensor is which region of which parameter of the transformers model.

Made by transformers itself: `revert_weight_conversion` is what `save_pretrained` uses to go from a
model's parameters to checkpoint names. It runs on meta tensors here, and what it returns still
says, by storage, offset and stride, which parameter it was cut from. What the directory really
holds decides between the names that are possible.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.core_model_loading import revert_weight_conversion

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights.directory_names import Prefix, find_prefix, shared_prefix, told_parts
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
        tied: second checkpoint name of a parameter to the parameter.
        fixed: checkpoint name of each persistent buffer to the buffer's; those are not trained.
        untrained: names of the directory's other tensors, which nobody reads or writes.
    """

    roots: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    tensors: tuple[CheckpointTensor, ...]
    fixed: dict[str, str] = field(default_factory=dict)
    untrained: tuple[str, ...] = ()

    def parts(self) -> str:
        """Which part of the directory is trained, in a sentence; empty where all of it is."""
        return told_parts([tensor.name for tensor in self.tensors], self.untrained)

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


def plan_checkpoint(model: Any, held: Collection[str] = ()) -> CheckpointPlan:
    """The plan of a transformers model whose parameters are on the meta device.

    Args:
        held: names of the tensors in the model directory; without them, or where they are others
            than any that are possible, the names are those that transformers would save.

    Raises FailedPrecondition where a checkpoint tensor is computed from several parameters, or the
    directory holds the text part twice.
    """
    roots, buffers = _roots(model), persistent_buffers(model)
    with torch.no_grad(), _CopiesAsViews():  # type: ignore[no-untyped-call]
        saved: dict[str, torch.Tensor] = revert_weight_conversion(model, roots | buffers)
    # Experts lie apart in some directories, and stacked as the model has them in others.
    possible = [_regions(names, roots | buffers) for names in (saved, roots | buffers)]
    for tensors in possible:
        if prefix := _prefix(model, [t for t in tensors if t.root in roots], held):
            return _named(model, tensors, prefix, held)
    return _named(model, possible[0], Prefix("", ""), ())


def _prefix(model: Any, tensors: list[CheckpointTensor], held: Collection[str]) -> Prefix | None:
    decoder = f"{model.base_model_prefix}."
    own = shared_prefix([t.name for t in tensors if t.root.startswith(decoder)])
    return find_prefix({tensor.name for tensor in tensors}, own, held)


def _named(
    model: Any, tensors: list[CheckpointTensor], prefix: Prefix, held: Collection[str]
) -> CheckpointPlan:
    roots = _roots(model)
    named = [replace(tensor, name=prefix.name(tensor.name, held)) for tensor in tensors]
    tied = {prefix.name(name, held): first for name, first in tied_parameters(model).items()}
    others = set(held) - {tensor.name for tensor in named} - tied.keys()
    return CheckpointPlan(
        {name: tuple(tensor.shape) for name, tensor in roots.items()},
        tied,
        tuple(tensor for tensor in named if tensor.root in roots),
        {tensor.name: tensor.root for tensor in named if tensor.root not in roots},
        tuple(sorted(others)),
    )


def _roots(model: Any) -> dict[str, torch.Tensor]:
    tied = tied_parameters(model)
    return {name: p.detach() for name, p in model.named_parameters() if name not in tied}


def tied_parameters(model: Any) -> dict[str, str]:
    """Second name of a parameter to its first."""
    first_name: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    firsts = {name: first_name.setdefault(p.untyped_storage()._cdata, name) for name, p in named}
    return {name: first for name, first in firsts.items() if first != name}


def persistent_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Buffers that a checkpoint holds, by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _regions(
    checkpoint: dict[str, torch.Tensor], of: dict[str, torch.Tensor]
) -> list[CheckpointTensor]:
    root_of = {tensor.untyped_storage()._cdata: name for name, tensor in of.items()}
    return [_region(name, tensor, root_of) for name, tensor in sorted(checkpoint.items())]


def _region(name: str, tensor: torch.Tensor, root_of: dict[int, str]) -> CheckpointTensor:
    root = root_of.get(tensor.untyped_storage()._cdata)
    if root is None:
        raise refusal(
            "CHECKPOINT_COMPUTED",
            f"transformers computes the checkpoint tensor {name} from several parameters.",
        )
    offset = int(tensor.storage_offset())
    return CheckpointTensor(name, root, tuple(tensor.shape), tuple(tensor.stride()), offset)

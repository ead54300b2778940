"""Which path steps a parameter: plain torch, compiled loops on a CPU, or kernels on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apollo_trainer.optim import cpu, cuda
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.options import Compat, Impl
from apollo_trainer.optim.parameters import Slot

Path = Literal["reference", "cpu", "cuda"]
# How steps of a kind of parameter are compiled: the path, the device, the dtype and the rank.
Kind = tuple[Path, torch.device, torch.dtype, int | None]
_MANY = 0.01  # of all weights: a smaller part that is stepped slowly is not worth a warning


@dataclass
class PreparedStep:
    """What a step works with, set aside before it begins.

    Attributes:
        gradients: that it is prepared for; None for the tensors' own.
        works: the parameters with a gradient, and by which path each is stepped.
        on_cuda: what the kernels of each device work with.
    """

    gradients: Mapping[Tensor, Gradient] | None
    works: list[tuple[Slot, Gradient, Path]]
    on_cuda: dict[torch.device, cuda.Prepared]


def path_of(slot: Slot, grad: Gradient, impl: Impl, compat: Compat | None, weights: int) -> Path:
    """The path that steps a parameter with this gradient.

    Args:
        weights: of the whole optimizer; with few, 'auto' compiles no loops for a CPU.

    Raises ValueError where impl='fused' and no compiled path takes the parameter.
    """
    if impl == "reference" or compat is not None:
        return "reference"
    if cuda.fits(slot, grad):
        return "cuda"
    if _compiles_loops(impl, weights) and cpu.fits(slot, grad):
        return "cpu"
    if impl == "fused":
        raise ValueError(
            f"{slot.name}: impl='fused' takes bfloat16 and float32 parameters on CUDA, with "
            "Triton installed, and these and float16 on a CPU, with numba installed, with "
            "gradients of these dtypes; nothing was changed. Use impl='auto'."
        )
    return "reference"


def slowness(slots: Sequence[Slot], impl: Impl, compat: Compat | None, weights: int) -> str:
    """Why steps are slow, in a sentence; empty where they are not.

    They are slow where plain torch steps many weights, was not asked for, and is slower.
    """
    if impl != "auto" or compat is not None:
        return ""
    loops = _compiles_loops(impl, weights)
    slow = [
        slot
        for slot in slots
        if (slot.param.is_cuda or loops)
        and path_of(slot, slot.param, impl, compat, weights) == "reference"
    ]
    count = sum(slot.param.numel() for slot in slow)
    if count < weights * _MANY:
        return ""
    kinds = sorted({_kind(slot) for slot in slow})
    return (
        f"Steps are slow: {count} of {weights} weights are stepped by plain torch, because no "
        f"kernel or compiled loop here takes {', '.join(kinds)}."
    )


def _kind(slot: Slot) -> str:
    if not slot.region.whole:
        return "parts of a matrix that several workers have"
    return f"{slot.param.dtype} on {slot.param.device.type}"


def compiled_kinds(
    slots: Sequence[Slot], impl: Impl, compat: Compat | None, weights: int
) -> set[Kind]:
    """What has to be compiled before these parameters can be stepped."""
    kinds: set[Kind] = {
        (path_of(s, s.param, impl, compat, weights), s.param.device, s.param.dtype, s.rank)
        for s in slots
    }
    return {kind for kind in kinds if kind[0] != "reference"}


def _compiles_loops(impl: Impl, weights: int) -> bool:
    return impl == "fused" or weights >= cpu.FEW_WEIGHTS

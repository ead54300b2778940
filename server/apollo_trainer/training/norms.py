"""RMS norms as one kernel each, which transformers computes by seven.

On a GPU a step of a few hundred tokens is bound by small kernels: of 58 in a layer of Qwen3's
forward pass 32 are of its norms. Which modules are RMS norms is found by trying them, never by
their names.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from apollo_trainer.training.kernels import rms_norm
except ImportError:  # no Triton
    rms_norm = None  # type: ignore[assignment]

# Two roundings to bfloat16 apart, where one of them rounds once.
_ROUNDING = 2.0**-7


@torch.no_grad()
def fuse_norms(model: Any) -> int:
    """Lets a model's RMS norms compute by one kernel; returns how many there are."""
    found = [(module, _eps(module)) for module in model.modules() if _is_rms_norm(module)]
    for module, eps in found:
        module.forward = partial(_instead_of, module, module.forward, eps)
    return len(found)


def _instead_of(
    module: Any, own: Any, eps: float | None, x: Tensor, *rest: Any, **named: Any
) -> Any:
    """Some norms are given a gate as well."""
    return own(x, *rest, **named) if rest or named else _fused(module, eps, x)


def _fused(module: Any, eps: float | None, x: Tensor) -> Tensor:
    weight = module.weight
    if x.is_cuda and eps is not None and rms_norm is not None and rms_norm.fits(x, weight):
        return rms_norm.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def _eps(module: nn.Module) -> float | None:
    given = [getattr(module, name, None) for name in ("variance_epsilon", "eps")]
    return next((eps for eps in given if isinstance(eps, float)), None)


def _is_rms_norm(module: nn.Module) -> bool:
    own = list(module.parameters())
    weight, eps = getattr(module, "weight", None), _eps(module)
    if len(own) != 1 or own[0] is not weight or own[0].ndim != 1 or eps is None:
        return False
    draw = torch.Generator().manual_seed(0)
    for size in (1.0, eps**0.5):
        x = torch.randn(4, len(own[0]), generator=draw).mul(size).to(own[0])
        try:
            said = module(x)
        except (TypeError, RuntimeError, ValueError, AttributeError):
            return False
        fused = _fused(module, eps, x)
        if not isinstance(said, Tensor) or said.dtype != x.dtype or said.shape != x.shape:
            return False
        if ((said - fused).abs() > _ROUNDING * fused.abs() + 1e-12).any():
            return False
    return True

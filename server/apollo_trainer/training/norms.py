"""RMS norms as one kernel each, which transformers computes by seven.

On a GPU a step of a few hundred tokens is bound by small kernels: of 58 in a layer of Qwen3's
forward pass 32 are of its norms. Which modules are RMS norms is found by trying them, never by
their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from apollo_trainer.training.kernels import gated, rms_norm
except ImportError:  # no Triton
    gated = rms_norm = None  # type: ignore[assignment]

# Two roundings to bfloat16 apart, where one of them rounds once.
_ROUNDING = 2.0**-7


@torch.no_grad()
def fuse_norms(model: Any) -> int:
    """Lets a model's RMS norms compute by one kernel; returns how many there are."""
    tried = [(module, _kind(module)) for module in model.modules()]
    found = [(module, kind) for module, kind in tried if kind is not None]
    for module, kind in found:
        module.forward = partial(_instead_of, module, module.forward, kind)
    return len(found)


@dataclass(frozen=True)
class _Kind:
    """What a norm multiplies by its weight: x / sqrt(mean(x^2) + eps).

    Attributes:
        added: to the weight; Gemma's and Qwen3.5's weights are kept less one.
        gated: the norm is never without a gate, and its result is times silu(gate).
    """

    eps: float
    added: float
    gated: bool = False


def _instead_of(module: Any, own: Any, kind: _Kind, x: Tensor, *rest: Any, **named: Any) -> Any:
    """Some norms are given a gate as well."""
    given = (*rest, *named.values())
    if len(given) != kind.gated or set(named) - {"gate"}:
        return own(x, *rest, **named)
    return _fused(module, kind, x, *given)


def _fused(module: Any, kind: _Kind, x: Tensor, gate: Tensor | None = None) -> Tensor:
    normal = _normal(module.weight, kind, x)
    if gate is None:
        return normal
    if gated is not None and x.is_cuda and gate.dtype == x.dtype and gate.shape == x.shape:
        return gated.gated_product(gate, normal)
    return (normal * F.silu(gate.float())).to(x.dtype)


def _normal(weight: Tensor, kind: _Kind, x: Tensor) -> Tensor:
    if x.is_cuda and rms_norm is not None and rms_norm.fits(x, weight):
        return rms_norm.rms_norm(x, weight, kind.eps, kind.added)
    if not kind.added:
        return F.rms_norm(x, weight.shape, weight, kind.eps)
    whole = weight.float() + kind.added
    return F.rms_norm(x.float(), weight.shape, whole, kind.eps).to(x.dtype)


def _eps(module: nn.Module) -> float | None:
    given = [getattr(module, name, None) for name in ("variance_epsilon", "eps")]
    return next((eps for eps in given if isinstance(eps, float)), None)


def _kind(module: nn.Module) -> _Kind | None:
    """None where it is no RMS norm."""
    own = list(module.parameters())
    weight, eps = getattr(module, "weight", None), _eps(module)
    if len(own) != 1 or own[0] is not weight or own[0].ndim != 1 or eps is None:
        return None
    kinds = [_Kind(eps, added, gated) for gated in (False, True) for added in (0.0, 1.0)]
    return next((kind for kind in kinds if _computes(module, kind)), None)


def _computes(module: nn.Module, kind: _Kind) -> bool:
    """Whether the module says what its kind does, of usual numbers and of those as small as eps."""
    (weight,) = module.parameters()
    draw = torch.Generator().manual_seed(0)
    for size in (1.0, kind.eps**0.5):
        x = torch.randn(4, len(weight), generator=draw).mul(size).to(weight)
        gates = [torch.randn(x.shape, generator=draw).to(x)] if kind.gated else []
        try:
            said = module(x, *gates)
        except (TypeError, RuntimeError, ValueError, AttributeError):
            return False
        fused = _fused(module, kind, x, *gates)
        if not isinstance(said, Tensor) or said.dtype != x.dtype or said.shape != x.shape:
            return False
        if ((said - fused).abs() > _ROUNDING * fused.abs() + 1e-12).any():
            return False
    return True

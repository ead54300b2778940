"""The optimizers that are compared, each made from named weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from measure import Weights
from torch.optim import Optimizer

from apollo_trainer.optim import Apollo

WINDOW = 200  # steps between two projections, the default of both
RANKS = ((1, "mini"), (64, "channel"), (256, "channel"))
TOKENS = 200  # whose factors are a matrix's gradient


class Unavailable(Exception):
    """An optimizer that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One row. `refresh` makes every later step draw a new projection.

    With `tokens` the gradients of matrices are factors of so many.
    """

    name: str
    make: Callable[[Weights], Optimizer]
    family: str
    rank: int | None = None
    refresh: Callable[[Optimizer], None] | None = None
    tokens: int = 0


def contenders() -> list[Contender]:
    """All rows, in the order of the table."""
    rows = [
        Contender("SGD foreach", lambda w: _torch(torch.optim.SGD, w, foreach=True), "torch"),
        Contender("AdamW fused", lambda w: _torch(torch.optim.AdamW, w, fused=True), "torch"),
        Contender("AdamW foreach", lambda w: _torch(torch.optim.AdamW, w, foreach=True), "torch"),
    ]
    for rank, variant in RANKS:
        rows.append(_apollo_torch_row(rank, variant))
    for impl in ("reference", "fused"):
        rows += [_apollo_row(rank, variant, impl) for rank, variant in RANKS]
    return [*rows, _factors_row(64), _factors_row(256)]


def _torch(kind: Callable[..., Optimizer], weights: Weights, **options: Any) -> Optimizer:
    return kind(weights.values(), lr=1e-5, **options)


def _label(rank: int, variant: str) -> str:
    return f"{'mini ' if variant == 'mini' else ''}rank {rank}"


def _apollo_row(rank: int, variant: str, impl: str) -> Contender:
    def make(weights: Weights) -> Optimizer:
        return _apollo(weights, rank, variant, impl)

    return Contender(f"Apollo {impl} {_label(rank, variant)}", make, "apollo", rank, _refresh)


def _apollo(weights: Weights, rank: int, variant: Any, impl: Any) -> Apollo:
    return Apollo(
        weights.items(), lr=1e-5, rank=rank, variant=variant, impl=impl, proj_refresh=WINDOW
    )


def _refresh(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["proj_refresh"] = 1


def _factors_row(rank: int) -> Contender:
    row = _apollo_row(rank, "channel", "fused")
    return replace(row, name=f"Apollo factors {_label(rank, 'channel')}", tokens=TOKENS)


def _apollo_torch_row(rank: int, variant: str) -> Contender:
    def make(weights: Weights) -> Optimizer:
        matrices = [p for p in weights.values() if p.ndim == 2]
        rest = [p for p in weights.values() if p.ndim != 2]
        projected = {
            "params": matrices,
            "rank": rank,
            "proj": "random",
            "proj_type": "std",
            "scale_type": "tensor" if variant == "mini" else "channel",
            "scale": 1.0,
            "update_proj_gap": WINDOW,
        }
        groups = [{"params": rest}, projected]
        made: Optimizer = _apollo_torch_class()(groups, lr=1e-5, weight_decay=0.01)
        return made

    name = f"apollo-torch {_label(rank, variant)}"
    return Contender(name, make, "apollo-torch", rank, _refresh_apollo_torch)


def apollo_torch(rank: int) -> Contender:
    """The published optimizer, channel by channel. Raises Unavailable where it is not installed."""
    _apollo_torch_class()
    return _apollo_torch_row(rank, "channel")


def _refresh_apollo_torch(optimizer: Optimizer) -> None:
    for entry in optimizer.state.values():
        if "projector" in entry:
            entry["projector"].update_proj_gap = 1


@lru_cache(maxsize=1)
def _apollo_torch_class() -> Any:
    """The published optimizer. Raises Unavailable where it cannot be imported.

    The package's own `__init__` imports bitsandbytes for optimizers that are not measured here;
    where that is missing, the one module is imported without it.
    """
    try:
        return importlib.import_module("apollo_torch").APOLLOAdamW
    except ImportError as error:
        reason = error
    try:
        spec = importlib.util.find_spec("apollo_torch")
        if spec is None or spec.submodule_search_locations is None:
            raise Unavailable(f"not installed: {reason}")
        package = types.ModuleType("apollo_torch")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["apollo_torch"] = package
        return importlib.import_module("apollo_torch.apollo").AdamW
    except ImportError as error:
        sys.modules.pop("apollo_torch", None)
        raise Unavailable(f"cannot be imported: {error}") from error

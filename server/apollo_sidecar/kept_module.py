"""Keeps a module as it is while its loader runs once more.

Some loaders make parameters anew (vLLM's Transformers backend does so for the bias of a head). Left
in the module, such a one would hold memory that nobody filled, and vLLM would serve noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def kept_module(model: torch.nn.Module) -> Iterator[None]:
    """Puts back afterwards what was registered in any part of the module, whatever happened.

    Meanwhile a parameter that takes the place of one of the same shape and dtype shares its memory,
    so that a write to it is seen as one to the live weight.
    """
    held = [
        (module, {name: dict(getattr(module, name)) for name in _REGISTRIES})
        for module in model.modules()
    ]
    parameters = {id(module): registries["_parameters"] for module, registries in held}

    def share(module: torch.nn.Module, name: str, new: Any) -> None:
        old = parameters.get(id(module), {}).get(name)
        if old is not None and new is not None and new is not old and _alike(old, new):
            new.data = old.data

    handle = register_module_parameter_registration_hook(share)
    try:
        yield
    finally:
        handle.remove()
        for module, registries in held:
            for name, before in registries.items():
                _put_back(getattr(module, name), before)


def _alike(old: torch.Tensor, new: torch.Tensor) -> bool:
    return (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)


def _put_back(registry: dict[str, Any], before: dict[str, Any]) -> None:
    same = registry.keys() == before.keys() and all(registry[k] is v for k, v in before.items())
    if not same:
        registry.clear()
        registry.update(before)

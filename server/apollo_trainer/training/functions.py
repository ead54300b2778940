"""Functions of a model's own code, which another takes the place of.

transformers' layers look such a function up in their file at each call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def files_with(model: Any, name: str) -> list[ModuleType]:
    """The files of a model's code that have a function of this name."""
    files = {type(module).__module__ for module in model.modules()}
    return [sys.modules[file] for file in sorted(files) if hasattr(sys.modules[file], name)]


def replace_function(model: Any, name: str, instead: Callable[[Any], Any]) -> int:
    """Replaces a function in all files of a model's code; returns in how many it is replaced.

    Args:
        instead: given the file's own, makes what takes its place, or None where that computes
            something else. Not called again where it was replaced before.
    """
    replaced = 0
    for file in files_with(model, name):
        own = getattr(file, name)
        made = own if getattr(own, "fused", False) else instead(own)
        if made is not None:
            made.fused = True
            setattr(file, name, made)
            replaced += 1
    return replaced

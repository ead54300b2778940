"""Stands in for torchvision, which cannot be installed beside a torch for CPUs.

Its wheels on PyPI are CUDA builds, and vLLM's multimodal classes import it. What they import is
here by name; what would read an image raises. Text never asks for it.
"""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType
from typing import Any, ClassVar

__version__ = "0.0"
__path__: list[str] = []


class InterpolationMode(Enum):
    """How an image would be resized."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Part(ModuleType):
    """A module of torchvision, with any function of it."""

    InterpolationMode = InterpolationMode
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} of the stand-in for torchvision")

        return absent


def _part(name: str) -> _Part:
    return sys.modules.setdefault(f"{__name__}.{name}", _Part(f"{__name__}.{name}"))  # type: ignore[return-value]


io, transforms = _part("io"), _part("transforms")
transforms.functional, transforms.v2 = _part("transforms.functional"), _part("transforms.v2")
transforms.v2.functional = _part("transforms.v2.functional")

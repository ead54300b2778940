"""Contexts whose keys stay where they are, apart from those of what continues them.

transformers' caches copy a context's keys three times before a continuation attends to them: into
the cache, next to the continuation's own, and before that to the right where contexts are padded.
Here a layer's attention is given both parts as they are. Whether a model computes the same so is
for the caller to find out: one whose masks say more than a window, or that changes keys after they
were cached, raises NotApart or says something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_WINDOW = "apollo_window"


class NotApart(RuntimeError):
    """A model attends in a way that contexts apart cannot follow."""


@dataclass(frozen=True, eq=False)
class Frozen:
    """Contexts whose keys and values have no gradient.

    Attributes:
        keys: [contexts, heads, width, size], of any strides but for the last, which is 1; padded
            on the right.
        values: likewise.
        rows: int64 [samples], the context of each sample.
        lengths: int64 [samples], how many of its keys each sample sees.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Rule:
    """What scores become, and which keys are seen.

    Attributes:
        scale: of the products.
        window: keys that a query sees, its own included; 0: all.
        cap: scores become cap tanh(score / cap); 0: they stay.
    """

    scale: float
    window: int = 0
    cap: float = 0.0


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keeps what it is given first, as it is, and gives back what it is given."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[rows, heads, width, size] each."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class Contexts(Cache):
    """A cache that a model fills with contexts, and that never grows by what continues them."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self._continued: tuple[Tensor, Tensor] | None = None
        self._asked = set[int]()

    def go_on(self, rows: Tensor, lengths: Tensor) -> None:
        """What follows continues them; int64 [samples] each, see `Frozen`."""
        self._continued = (rows, lengths)

    def require_asked(self) -> None:
        """Raises NotApart where a layer did not ask for its contexts, and went on without them."""
        if self._continued is not None and len(self._asked) < len(self.layers):
            raise NotApart("a layer attends by code of its own")

    def of(self, layer: int, key: Tensor) -> Frozen | None:
        """What a layer's new keys [samples, heads, T, size] continue; None while it is made.

        Raises NotApart where they are not of the cached keys' kind.
        """
        if self._continued is None:
            return None
        kept: Any = self.layers[layer]
        self._asked.add(layer)
        if kept.keys is None:
            raise NotApart("a layer has no keys")
        heads, size = kept.keys.shape[1], kept.keys.shape[3]
        if (heads, size, kept.keys.dtype) != (key.shape[1], key.shape[3], key.dtype):
            raise NotApart("keys are changed after they were cached")
        keys, values = (
            t if t.stride(-1) == 1 else t.contiguous() for t in (kept.keys, kept.values)
        )
        return Frozen(keys, values, *self._continued)


_CURRENT: ContextVar[Contexts | None] = ContextVar("contexts apart", default=None)


@contextmanager
def attending_apart(contexts: Contexts) -> Iterator[None]:
    """Around passes of a model whose attention is to find these contexts."""
    before = _CURRENT.set(contexts)
    try:
        yield
    finally:
        _CURRENT.reset(before)


def current() -> Contexts | None:
    """The contexts of the passes that run."""
    return _CURRENT.get()


def window_mask(window: int, device: Any) -> Tensor:
    """Stands for a mask that says how many keys a query sees; 0: all before it."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    setattr(mask, _WINDOW, window)
    return mask


def window_of(mask: Tensor | None) -> int:
    """What `window_mask` was told. Raises NotApart where the mask is another."""
    window = 0 if mask is None else getattr(mask, _WINDOW, None)
    if window is None:
        raise NotApart("a mask of the model's own")
    return int(window)

"""A model's log-probabilities with every float one size wider than its weights'.

What two right computations of one model may differ by is what rounding does to one of them: the
distance of the training model from itself in wider floats, on the same weights and tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

WIDER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}
_NARROW = {torch.float32: {torch.bfloat16, torch.float16}, torch.float64: set(WIDER)}
# They pick elements and compute nothing: a whole table would be widened for a few rows of it.
_PICKING = {"aten::embedding", "aten::index_select", "aten::index", "aten::gather"}
# Without a form in float64.
_SINGLE = {"aten::_grouped_mm"}
# A wider copy of so many elements at a time: 256 MB in float32.
CHUNK_ELEMENTS = 64 << 20


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in wider floats: operands are widened as each operator comes, and then let go.

    No more than one operator's weights are held wider at a time, and of a matrix product no more
    than `CHUNK_ELEMENTS`.

    Args:
        wide: float32 or float64.
    """

    def __init__(self, wide: torch.dtype):
        super().__init__()  # type: ignore[no-untyped-call]
        self._wide, self._narrow = wide, _NARROW[wide]
        self._convolutions = _Convolutions(self._widen)

    def __enter__(self) -> Self:
        self._convolutions.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._convolutions.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = func._schema
        kwargs = tree_map(self._wider_dtype, kwargs or {})
        if any(r.alias_info and not r.alias_info.is_write for r in schema.returns):
            return func(*args, **kwargs)
        if schema.name in _PICKING:
            return tree_map(self._widen, func(*args, **kwargs))
        # What is written in place must stay the same tensor.
        kept = 1 if schema.is_mutable else 0
        args = (*args[:kept], *tree_map(self._hold_back(func), tuple(args[kept:])))
        return self._compute(func, args, tree_map(self._widen, kwargs))

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten.mm.default and args[1].dtype in self._narrow:
            parts = args[1].split(max(1, CHUNK_ELEMENTS // args[1].shape[0]), 1)
            return torch.cat([args[0] @ part.to(self._wide) for part in parts], 1)
        if self._wide is torch.float64 and func._schema.name in _SINGLE:
            return func(*tree_map(_to_single, args), **tree_map(_to_single, kwargs)).double()
        return func(*args, **kwargs)

    def _hold_back(self, func: Any) -> Any:
        """Widens all operands, but for a large matrix that is widened in parts."""
        if func is not torch.ops.aten.mm.default:
            return self._widen
        return lambda x: x if _is_large(x) else self._widen(x)

    def _widen(self, value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.dtype in self._narrow
        return value.to(self._wide) if narrow else value

    def _wider_dtype(self, value: Any) -> Any:
        return self._wide if isinstance(value, torch.dtype) and value in self._narrow else value


class _Convolutions(TorchFunctionMode):
    """Widens what a convolution is given, whose dtypes torch compares before any operator."""

    def __init__(self, widen: Callable[[Any], Any]):
        super().__init__()
        self._widen = widen

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`."""
        if func is torch.conv1d:
            args, kwargs = tree_map(self._widen, args), tree_map(self._widen, kwargs)
        return func(*args, **(kwargs or {}))


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > CHUNK_ELEMENTS


def _to_single(value: Any) -> Any:
    double = isinstance(value, torch.Tensor) and value.dtype is torch.float64
    return value.float() if double else value

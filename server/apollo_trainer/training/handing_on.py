"""Products, embeddings and experts whose backward pass hands on what their gradient is made of.

Each hands on its input and the gradient of its output, and makes no gradient of the weights.
Operations of torch are replaced and no modules, so that no family of models needs code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

HandOn = Callable[[Tensor, Tensor], None]


class Takes(Protocol):
    """Who takes what is handed on.

    Attributes:
        params: leaves by their id; what is computed with others is left as it is.
    """

    params: dict[int, Tensor]

    def add(self, param: Tensor, left: Tensor, right: Tensor, whose: int | Tensor | None) -> None:
        """The factors of a matrix, of one expert, or of experts by the ends of their tokens."""

    def add_rows(self, param: Tensor, ids: Tensor, rows: Tensor) -> None:
        """The gradients of rows of an embedding."""


class HandingOn(TorchFunctionMode):
    """Replaces what is computed with a parameter of the gradients."""

    def __init__(self, gradients: Takes):
        super().__init__()
        self._gradients = gradients

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, or what takes its place."""
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and torch.is_grad_enabled():
            result = replacement(self._gradients, *args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _linear(
    gradients: Takes, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    return _multiply(gradients, input, weight, weight.mT, bias)


def _matmul(gradients: Takes, input: Any, other: Any, **others: Any) -> Tensor | None:
    if others or not isinstance(other, Tensor) or not isinstance(input, Tensor):
        return None
    return _multiply(gradients, input, other, other)


def _addmm(
    gradients: Takes, bias: Tensor, input: Tensor, other: Tensor, **others: Any
) -> Tensor | None:
    if others or bias.ndim != 1:
        return None
    return _multiply(gradients, input, other, other, bias)


def _multiply(
    gradients: Takes, x: Tensor, weight: Tensor, matrix: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """x @ matrix + bias, where `weight` is a parameter's, and `matrix` it or its transpose."""
    found = _owner(gradients, weight) if weight.ndim == 2 and x.ndim > 1 else None
    if found is None:
        return None
    param, expert = found
    # Whether a column of the parameter is one of the output.
    outputs_last = matrix.stride() == param.stride()[-2:] and matrix.shape == param.shape[-2:]

    def hand_on(rows: Tensor, outputs: Tensor) -> None:
        sides = (rows, outputs) if outputs_last else (outputs, rows)
        gradients.add(param, *sides, expert)

    return _apply(_Product, x, param, matrix.detach(), bias, hand_on)


def _grouped(
    gradients: Takes, input: Tensor, weight: Tensor, offs: Tensor | None = None, **rest: Any
) -> Tensor | None:
    """Experts that each multiply their own tokens: [S, in] and [E, in, out]."""
    others = any(value is not None for value in rest.values())
    param = _base(gradients, weight)
    if param is None or others or offs is None or (input.ndim, weight.ndim) != (2, 3):
        return None
    outputs_last = weight.stride() == param.stride()

    def hand_on(rows: Tensor, outputs: Tensor) -> None:
        sides = (rows, outputs) if outputs_last else (outputs, rows)
        gradients.add(param, *sides, offs)

    return _apply(_GroupedProduct, input, param, weight.detach(), offs, hand_on)


def _embedding(
    gradients: Takes, input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:  # fmt: skip
    if id(weight) not in gradients.params or max_norm or scale_grad_by_freq or sparse:
        return None

    def hand_on(ids: Tensor, rows: Tensor) -> None:
        if padding_idx is not None:
            rows = rows.masked_fill((ids == padding_idx % len(weight))[:, None], 0)
        gradients.add_rows(weight, ids, rows)

    return _apply(_Rows, input, weight, weight.detach(), hand_on)


_REPLACEMENTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch._grouped_mm: _grouped,
}


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _base(gradients: Takes, weight: Tensor) -> Tensor | None:
    """The parameter that the weight is, or is a view of."""
    if id(weight) in gradients.params:
        return weight
    base = weight._base if weight.requires_grad else None
    return base if base is not None and id(base) in gradients.params else None


def _owner(gradients: Takes, weight: Tensor) -> tuple[Tensor, int | None] | None:
    """The parameter that a matrix is, transposed or not, or the stack and the expert that it is."""
    param = _base(gradients, weight)
    if param is None or param.ndim not in (2, 3):
        return None
    sides = list(zip(weight.shape, weight.stride(), strict=True))
    own = list(zip(param.shape[-2:], param.stride()[-2:], strict=True))
    if sides not in (own, own[::-1]):
        return None
    skipped = weight.storage_offset() - param.storage_offset()
    if param.ndim == 2:
        return (param, None) if not skipped else None
    return param, skipped // param.stride(0)


class _Product(torch.autograd.Function):
    """x @ matrix + bias; its backward pass makes dX, and hands on x [T, in] and dY [T, out]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, param: Tensor, matrix: Tensor, bias: Tensor | None, hand_on: HandOn
    ) -> Tensor:
        """The parameter is given so that the result has a gradient, whatever x is."""
        ctx.save_for_backward(x, matrix)
        ctx.hand_on = hand_on
        return F.linear(x, matrix.mT, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of the result, [..., out]."""
        x, matrix = ctx.saved_tensors
        dy = grads[0].reshape(-1, matrix.shape[1])
        ctx.hand_on(x.detach().reshape(-1, matrix.shape[0]), dy)
        dx = (dy @ matrix.mT).view(x.shape) if ctx.needs_input_grad[0] else None
        bias = dy.sum(0) if ctx.needs_input_grad[3] else None
        return dx, None, None, bias, None


class _GroupedProduct(torch.autograd.Function):
    """Each expert's tokens times its matrix [in, out], the gradient likewise."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, param: Tensor, matrices: Tensor, ends: Tensor, hand_on: HandOn
    ) -> Tensor:
        """x [S, in] is sorted by expert."""
        ctx.save_for_backward(x, matrices, ends)
        ctx.hand_on = hand_on
        return torch._grouped_mm(x, matrices, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of the result, [S, out]."""
        x, matrices, ends = ctx.saved_tensors
        dy = grads[0].contiguous()
        ctx.hand_on(x.detach(), dy)
        dx = torch._grouped_mm(dy, matrices.mT, offs=ends) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


class _Rows(torch.autograd.Function):
    """Rows of an embedding; its backward pass hands on their ids [T] and gradients [T, b]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, param: Tensor, weight: Tensor, hand_on: HandOn) -> Tensor:
        """The parameter is given so that the result has a gradient."""
        ctx.save_for_backward(ids)
        ctx.hand_on = hand_on
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of the rows, [..., b]."""
        ids = ctx.saved_tensors[0].reshape(-1)
        ctx.hand_on(ids, grads[0].reshape(len(ids), -1))
        return None, None, None, None

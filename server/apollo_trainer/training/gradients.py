"""A step's gradients: those of linear layers and embeddings as factors, of all else as they are.

While it collects, each product with a parameter, each embedding and each group of experts is
replaced by one that hands on its input and the gradient of its output, and makes no gradient of the
weights. It replaces operations of torch and no modules, so that no family of models needs code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from apollo_trainer.optim.factored import Factored, Gradient, joined, total

HandOn = Callable[[Tensor, Tensor], None]
# A product's factors, and whose they are: an expert, the experts' ends, or the only matrix.
_Part = tuple[Tensor, Tensor, int | Tensor | None]


@dataclass
class Collected:
    """What backward passes left, by the parameter's id.

    Attributes:
        parts: factors, of which a gradient is the sum.
        sums: gradients that were made.
        made: weights whose gradient was made because its factors would have been larger.
    """

    parts: dict[int, list[_Part]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[int, Tensor] = field(default_factory=dict)
    made: int = 0


class StepGradients:
    """Sums the gradients of a step over its backward passes; nothing waits for the device.

    A matrix has factors for as many tokens as its smaller side is long. With more they would be
    larger than the gradient, which then is made, and summed in float32: a sum in bfloat16 stops
    growing at 256 times what is added to it.

    Args:
        params: leaves, each once.

    Attributes:
        held: what was collected and is not settled.
    """

    def __init__(self, params: Iterable[Tensor]):
        self.params = {id(param): param for param in params if param.requires_grad}
        self.held = Collected()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Around forward and backward passes; the leaves are left without a `grad`."""
        hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            for p in self.params.values()
        ]
        try:
            with _Replacing(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def settle(self) -> dict[Tensor, Gradient]:
        """The gradient of each leaf that has one; they are let go of here."""
        found: dict[Tensor, Gradient] = {}
        for key, param in self.params.items():
            parts, dense = self.held.parts.pop(key, None), self.held.sums.pop(key, None)
            gradients: list[Gradient] = [] if dense is None else [dense]
            if parts:
                gradients.append(_product(parts, param))
            if gradients:
                found[param] = total(gradients)
        return found

    def add(self, param: Tensor, left: Tensor, right: Tensor, whose: int | Tensor | None) -> None:
        """Takes left^T right, [T, a] and [T, b], as a gradient of a matrix or of experts."""
        key, part = id(param), (left.contiguous(), right.contiguous(), whose)
        if key not in self.held.sums and self._fits(param, len(left)):
            self.held.parts[key].append(part)
            return
        self._count(param)
        for each in [*self.held.parts.pop(key, []), part]:
            self.add_whole(param, _product([each], param).dense(param.dtype))

    def add_rows(self, param: Tensor, ids: Tensor, rows: Tensor) -> None:
        """Takes the gradients of rows of an embedding [V, b]: ids [T] and rows [T, b]."""
        if id(param) not in self.held.sums and self._fits(param, len(ids)):
            places = rows.new_zeros(len(ids), len(param)).scatter_(1, ids[:, None], 1)
            self.add(param, places, rows, None)
            return
        self._count(param)
        whole = torch.zeros(param.shape, dtype=torch.float32, device=rows.device)
        self.add_whole(param, whole.index_add_(0, ids, rows.float()))

    def add_whole(self, param: Tensor, part: Tensor) -> None:
        """Takes a gradient of the parameter's shape, which is the caller's no more."""
        held = self.held.sums.get(id(param))
        if held is not None:
            part = held.to(torch.promote_types(held.dtype, torch.float32)).add_(part)
        self.held.sums[id(param)] = part

    def collected(self) -> Collected:
        """What the passes left, to be taken again and again where a graph makes it anew."""
        held, self.held = self.held, Collected()
        return held

    @torch.no_grad()
    def replay(self, collected: Collected, *, copy: bool) -> None:
        """Takes what replayed passes left, as if they had run inside `collecting`.

        Args:
            copy: the passes are replayed again before this is settled.
        """
        for key, param in self.params.items():
            for left, right, whose in collected.parts.get(key, ()):
                mine = (left.clone(), right.clone(), _own(whose)) if copy else (left, right, whose)
                self.add(param, *mine)
            if (dense := collected.sums.get(key)) is not None:
                self.add_whole(param, dense.clone() if copy else dense)
        self.held.made += collected.made

    def _count(self, param: Tensor) -> None:
        if id(param) not in self.held.sums:
            self.held.made += param.numel()

    def _fits(self, param: Tensor, more: int) -> bool:
        tokens = sum(len(left) for left, _, _ in self.held.parts.get(id(param), ()))
        return tokens + more <= param.numel() // max(param.shape[-2:])

    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        part, param.grad = param.grad, None
        # It is called for a parameter too whose products handed their factors on.
        if part is not None:
            self.add_whole(param, part)


def _own(whose: int | Tensor | None) -> int | Tensor | None:
    return whose.clone() if isinstance(whose, Tensor) else whose


def _product(parts: Sequence[_Part], param: Tensor) -> Factored:
    """Factors of several passes as one product."""
    if isinstance(parts[0][2], int):
        return _of_experts(sorted(parts, key=lambda part: int(part[2] or 0)), len(param))
    return joined([Factored(left, right, ends) for left, right, ends in parts])  # type: ignore[arg-type]


def _of_experts(parts: Sequence[_Part], experts: int) -> Factored:
    counts = [0] * experts
    for left, _, expert in parts:
        counts[int(expert or 0)] += len(left)
    left, right = (torch.cat(list(side)) for side in zip(*(p[:2] for p in parts), strict=True))
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return Factored(left, right, ends.to(left.device))


class _Replacing(TorchFunctionMode):
    """Replaces what is computed with a parameter of the gradients."""

    def __init__(self, gradients: StepGradients):
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
    gradients: StepGradients, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    return _multiply(gradients, input, weight, weight.mT, bias)


def _matmul(gradients: StepGradients, input: Any, other: Any, **others: Any) -> Tensor | None:
    if others or not isinstance(other, Tensor) or not isinstance(input, Tensor):
        return None
    return _multiply(gradients, input, other, other)


def _addmm(
    gradients: StepGradients, bias: Tensor, input: Tensor, other: Tensor, **others: Any
) -> Tensor | None:
    if others or bias.ndim != 1:
        return None
    return _multiply(gradients, input, other, other, bias)


def _multiply(
    gradients: StepGradients, x: Tensor, weight: Tensor, matrix: Tensor, bias: Tensor | None = None
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
    gradients: StepGradients, input: Tensor, weight: Tensor, offs: Tensor | None = None, **rest: Any
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
    gradients: StepGradients, input: Tensor, weight: Tensor, padding_idx: int | None = None,
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


def _base(gradients: StepGradients, weight: Tensor) -> Tensor | None:
    """The parameter that the weight is, or is a view of."""
    if id(weight) in gradients.params:
        return weight
    base = weight._base if weight.requires_grad else None
    return base if base is not None and id(base) in gradients.params else None


def _owner(gradients: StepGradients, weight: Tensor) -> tuple[Tensor, int | None] | None:
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

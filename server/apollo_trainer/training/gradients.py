"""A step's gradients: those of linear layers and embeddings as factors, of all else as they are.

`handing_on.py` replaces what is computed with a parameter while they are collected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.optim.factored import Factored, Gradient, joined, total
from apollo_trainer.training.handing_on import HandingOn

# A product's factors, and whose they are: an expert, the experts' ends, or the only matrix.
_Part = tuple[Tensor, Tensor, int | Tensor | None]
# Of the smaller side: with 2048 tokens of a Qwen3-4B the factors took 184 ms of a step on an H200.
_TOKENS_OF_A_SIDE = 2


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

    A matrix has factors for half as many tokens as its smaller side is long. With more, what is
    found from them takes longer than what is found from the gradient, which then is made, and
    summed in float32: a sum in bfloat16 stops growing at 256 times what is added to it.

    Args:
        params: leaves, each once.
        passes: backward passes of the step; with the size of the first they tell whether factors
            pay.

    Attributes:
        held: what was collected since the last `settle`. Those of a CUDA graph are never settled:
            each replay writes to the same tensors, which `replay` then reads.
    """

    def __init__(self, params: Iterable[Tensor], passes: int = 1):
        self.params = {id(param): param for param in params if param.requires_grad}
        self._passes = passes
        self.held = Collected()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Around forward and backward passes; the leaves are left without a `grad`."""
        hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            for p in self.params.values()
        ]
        try:
            with HandingOn(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def settle(self) -> dict[Tensor, Gradient]:
        """The gradient of each leaf that has one. Nothing is held afterwards."""
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
        """Adds a gradient of the parameter's shape; the caller must not use that tensor again."""
        held = self.held.sums.get(id(param))
        if held is not None:
            part = held.to(torch.promote_types(held.dtype, torch.float32)).add_(part)
        self.held.sums[id(param)] = part

    @torch.no_grad()
    def replay(self, collected: Collected, *, copy: bool) -> None:
        """Takes what replayed passes left, as if they had run inside `collecting`.

        Args:
            copy: True where the passes are replayed again before `settle`, which overwrites it.
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
        wanted = tokens + more if tokens else self._passes * more
        return wanted <= param.numel() // max(param.shape[-2:]) // _TOKENS_OF_A_SIDE

    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        part, param.grad = param.grad, None
        # The hook also runs for parameters whose gradient came as factors: these have no grad.
        if part is not None:
            self.add_whole(param, part)


def backward(weighted: Tensor) -> None:
    """A backward pass; none where nothing that learns was met."""
    if weighted.requires_grad:
        torch.autograd.backward([weighted])


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

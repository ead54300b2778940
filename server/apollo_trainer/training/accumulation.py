"""The gradient of a step that takes several micro-batches: summed in float32, rounded once.

A sum in bfloat16 stops growing at 256 times what is added to it: what comes last would be lost,
and a plan puts long contexts last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from apollo_trainer.training.release import each_gradient


@contextmanager
def summed_gradients(params: Iterable[Tensor]) -> Iterator[None]:
    """Every backward pass inside adds to one sum a parameter, which is its gradient afterwards.

    Costs 4 bytes a weight until the end, and the gradient of one parameter beside them: autograd's
    own sum in 16 bits takes 2. The sum is then rounded to the weights' dtype, as each pass's part
    was, so that the optimizer steps it as it steps any other gradient.

    Args:
        params: leaves without a gradient, each once.
    """
    sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def add(param: Tensor) -> None:
        part, param.grad = param.grad, None
        assert part is not None
        if param in sums:
            sums[param].add_(part)
        else:
            sums[param] = part.to(torch.promote_types(part.dtype, torch.float32))

    with each_gradient(list(params), add):
        yield
    for param in list(sums):
        # One by one: a second copy of all of them would not fit.
        param.grad = sums.pop(param).to(param.dtype)

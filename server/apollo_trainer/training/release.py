"""Backward passes that let go of each gradient as soon as it has been used.

Nothing may be written once a guard has fired, and a gradient is known to be finite only at the end
of the backward pass. So it is run twice over one forward: a trial that looks at each gradient, and
then the pass that writes. One gradient exists at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from apollo_grpc.errors import Internal
from apollo_trainer.optim import Apollo

log = logging.getLogger(__name__)
# What the fused step needs beside the gradient of a large parameter, on a GPU; measured 44 MB.
STEP_SCRATCH_BYTES = 64 * 2**20


class StepIncomplete(Internal):
    """A step failed while it was written: part of it is in the weights, and cannot be taken out."""

    default_reason = "STEP_INCOMPLETE"


def trial_backward(
    loss: Tensor, params: Sequence[Tensor], look: Callable[[Tensor], None], *, keep_graph: bool
) -> None:
    """Shows each parameter with its gradient to `look`, and frees the gradient.

    Args:
        loss: a scalar with gradient.
        keep_graph: for the backward pass that writes.
    """

    def use(param: Tensor) -> None:
        look(param)
        param.grad = None
        if param.is_cuda:
            # The writing pass allocates this too: it must fail now, when nothing is written.
            torch.empty(STEP_SCRATCH_BYTES, dtype=torch.uint8, device=param.device)

    with each_gradient(params, use):
        torch.autograd.backward([loss], retain_graph=keep_graph)


def write_backward(loss: Tensor, params: Sequence[Tensor], optimizer: Apollo) -> float:
    """Steps each parameter when its gradient is there, and frees it; returns the step's seconds."""
    seconds = 0.0

    def use(param: Tensor) -> None:
        nonlocal seconds
        began = time.perf_counter()
        if optimizer.step_param(param):
            param.grad = None
        seconds += time.perf_counter() - began

    optimizer.begin_step()
    try:
        with each_gradient(params, use):
            torch.autograd.backward([loss])
        began = time.perf_counter()
        optimizer.end_step()
        return seconds + time.perf_counter() - began
    except BaseException:
        optimizer.abandon_step()
        raise


@contextmanager
def telling_incomplete(optimizer: Apollo) -> Iterator[None]:
    """Around a step: raises StepIncomplete for what fails once it is partly in the weights.

    What forbids the write passes as it is: it must not be told as a write that failed halfway.
    What a device failed at is known when its results are read: read them inside.
    """
    try:
        yield
    except BaseException as error:
        if not optimizer.wrote:
            raise
        log.error("a step failed while it was written", exc_info=error)
        raise StepIncomplete(
            "A step failed while it was written: part of it is in the weights and in the "
            "optimizer's state. The server's log has the cause. Restore a snapshot, or restart "
            "vLLM to load the model directory again."
        ) from error


@contextmanager
def each_gradient(params: Sequence[Tensor], use: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `use` with each parameter when its gradient has been accumulated."""
    hooks: list[Any] = [
        p.register_post_accumulate_grad_hook(use)  # type: ignore[no-untyped-call]
        for p in params
        if p.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

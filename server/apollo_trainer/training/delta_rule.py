"""Gated delta rules: a library's kernel where it is right, plain torch where it is not.

flash-linear-attention's forward passes are some ten times as fast as the code that transformers
has for every device; its backward passes refuse some releases of Triton on some GPUs, as wrong.
Contexts have no backward pass. Plain torch is `gated_delta.py`. What a model is given is found by
trying it beside transformers' code, which stays where neither says the same.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.training.functions import files_with
from apollo_trainer.training.gated_delta import gated_delta_rule

log = logging.getLogger(__name__)
NAME, _LIBRARY = "torch_chunk_gated_delta_rule", "fla"
# Of a result's norm: several roundings to bfloat16 of sums over a chunk.
_NOISE = 0.02
# Kernels are cut for numbers of 16 bits; those of 32 may not fit into a GPU's shared memory.
_NARROW = (torch.bfloat16, torch.float16)


def choose_delta_rule(model: Any, device: torch.device | None = None) -> str:
    """Has a model's files use what is right; returns a sentence on it, empty where there is none.

    The sentence says what is slow, or who computes what. Call it before anything is computed with
    the model: transformers takes the library's kernel wherever there is one.

    Args:
        device: where it is tried; the model's own, unless that has no memory, as of a twin.
    """
    told = {_choose(file, device or model.device) for file in files_with(model, NAME)}
    return " ".join(sorted(told))


def _choose(file: ModuleType, device: torch.device) -> str:
    current = getattr(file, NAME)
    kernel, own = getattr(current, "kernel", current), inspect.unwrap(current)
    plain = gated_delta_rule if all(_works(gated_delta_rule, own, device)) else own
    if importlib.util.find_spec(_LIBRARY) is None or kernel is own:
        setattr(file, NAME, _either(own, kernel, plain, reads=False, learns=False))
        return (
            "Linear attention runs by plain torch, and slower: there is no flash-linear-attention."
        )
    learns, reads = _works(kernel, own, device)
    setattr(file, NAME, _either(own, kernel, plain, reads=reads, learns=learns))
    if learns:
        return ""
    if reads:
        return (
            "Linear attention reads contexts by flash-linear-attention, and learns by plain torch."
        )
    return "Linear attention runs by plain torch, and slower: flash-linear-attention is wrong here."


def _either(own: Any, kernel: Any, plain: Any, *, reads: bool, learns: bool) -> Any:
    """In `own`'s place the kernel where it is right, for what is read or learned; else plain."""

    @functools.wraps(own)
    def rule(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = (query, *args, *kwargs.values())
        wanted = any(isinstance(each, Tensor) and each.requires_grad for each in given)
        right = learns if wanted and torch.is_grad_enabled() else reads
        uses = right and query.dtype in _NARROW
        return (kernel if uses else plain)(query, *args, **kwargs)

    rule.kernel = kernel  # type: ignore[attr-defined]
    return rule


def _works(kernel: Any, own: Any, device: torch.device) -> tuple[bool, bool]:
    """Whether a kernel says what transformers' own code says, gradients included, and results."""
    expected = _tried(own, device)
    # A compiler's errors are of no kind that could be named here.
    try:
        got = _tried(kernel, device, gradients=False)
    except Exception as error:
        log.info("no kernel for the delta rule: %s: %s", type(error).__name__, error)
        return False, False
    forward = _agree(got, expected[: len(got)])
    try:
        backward = forward and _agree(_tried(kernel, device), expected)
    except Exception as error:
        log.info("no gradients of a kernel for the delta rule: %s: %s", type(error).__name__, error)
        backward = False
    return backward, forward


def _tried(rule: Any, device: torch.device, *, gradients: bool = True) -> list[Tensor]:
    """The result and the last state of four chunks and a half, and gradients of all inputs."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        made = torch.randn(*shape, generator=draw).to(device, dtype)
        return made.requires_grad_(gradients)

    query, key, value = (drawn(1, 288, 4, 64) for _ in range(3))
    g = drawn(1, 288, 4, dtype=torch.float32)
    beta, state = drawn(1, 288, 4), drawn(1, 4, 64, 64, dtype=torch.float32)
    leaves = [query, key, value, g, beta, state]
    how = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    decay = -torch.nn.functional.softplus(g)
    with torch.set_grad_enabled(gradients):
        found = list(rule(query, key, value, g=decay, beta=beta.sigmoid(), **how))
    if not gradients:
        return found
    of_result = torch.randn(found[0].shape, generator=draw).to(found[0])
    return [*found, *torch.autograd.grad([found[0]], leaves, [of_result])]


def _agree(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        one.shape == other.shape
        and bool((one.float() - other.float()).norm() <= _NOISE * other.float().norm())
        for one, other in zip(got, expected, strict=True)
    )

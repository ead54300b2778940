"""Products of 16-bit matrices on a CPU without instructions for them, by way of float32.

There torch has them from loops of its own (aten/src/ATen/native/cpu/BlasKernel.cpp), which took six
times as long as the same product in float32 on a CPU with AVX2. Operands are widened a part at a
time, summed in float32, and the result is rounded once.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
# Of the larger operand at a time: 1 MB in float32, which a core's own cache holds.
PART_ELEMENTS = 1 << 18


@functools.cache
def widen_narrow_products() -> Any:
    """Has torch compute them so in this process, for good; None where the CPU can by itself.

    Rounding is the only difference, and there is less of it.
    """
    slow = frozenset(dtype for dtype, fast in _fast().items() if not fast)
    if not slow:
        return None
    log.info("this CPU multiplies no 16-bit floats: torch is made to do it in float32")
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # That torch's own is overridden.
        library.impl("mm", functools.partial(_mm, slow), "CPU")
        library.impl("addmm", functools.partial(_addmm, slow), "CPU")
    return library  # It is undone when nobody holds it.


def _fast() -> dict[torch.dtype, bool]:
    supported = torch.ops.mkldnn
    return {
        torch.bfloat16: supported._is_mkldnn_bf16_supported(),
        torch.float16: supported._is_mkldnn_fp16_supported(),
    }


def _mm(slow: frozenset[torch.dtype], left: Tensor, right: Tensor) -> Tensor:
    """[m, k] @ [k, n]."""
    if left.dtype in slow and left.dtype == right.dtype:
        return wide_product(left, right).to(left.dtype)
    # The form with a result given is torch's own still, and checks what it is given.
    return torch.ops.aten.mm.out(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]


def _addmm(
    slow: frozenset[torch.dtype],
    bias: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """bias * beta + [m, k] @ [k, n] * alpha."""
    if left.dtype in slow and left.dtype == right.dtype == bias.dtype:
        product = wide_product(left, right).mul_(alpha)
        # As torch has it: without a weight, what the bias holds does not count.
        return (product.add_(bias, alpha=beta) if beta else product).to(left.dtype)
    out = left.new_empty(0)
    return torch.ops.aten.addmm.out(  # type: ignore[no-any-return]
        bias, left, right, beta=beta, alpha=alpha, out=out
    )


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """[m, k] @ [k, n] of narrow floats, in float32."""
    if left.shape[0] > right.shape[1]:
        return wide_product(right.mT, left.mT).mT
    wide, (inner, columns) = left.float(), right.shape
    if inner > columns:
        return _by_terms(wide, right)
    out = wide.new_empty(len(wide), columns)
    size = max(1, PART_ELEMENTS // max(1, inner))
    for part, into in zip(*(torch.split(each, size, 1) for each in (right, out)), strict=True):
        into.copy_(torch.mm(wide, part.float()))
    return out


def _by_terms(wide: Tensor, right: Tensor) -> Tensor:
    """The sum of products of a part of the inner dimension."""
    out = wide.new_zeros(len(wide), right.shape[1])
    size = max(1, PART_ELEMENTS // max(1, right.shape[1]))
    for mine, part in zip(torch.split(wide, size, 1), torch.split(right, size), strict=True):
        out.addmm_(mine, part.float())
    return out

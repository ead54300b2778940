"""Attention over a frozen context on CUDA, against plain products and a mask.

TRITON_INTERPRET=1 runs the kernels on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from apollo_trainer.training.apart import Frozen, Rule  # noqa: E402
from apollo_trainer.training.kernels.attention import attend  # noqa: E402
from tests.training.kernels.device import DEVICE, DTYPES, needs_device  # noqa: E402
from tests.training.plain_attention import attended  # noqa: E402

pytestmark = needs_device
CASES = {
    "grouped": {},
    "one head each": {"heads": 2, "key_heads": 2},
    "in parts": {"context": 700, "T": 5, "lengths": (700, 257)},
    "rows share a context": {"contexts": 1, "rows": (0, 0, 0), "lengths": (9, 9, 9)},
    "rows are selected": {"contexts": 2, "rows": (1, 0, 1), "lengths": (9, 20, 3)},
    "no context": {"contexts": 0, "rows": (0, 0)},
    "a window": {"window": 7},
    "a window in parts": {"context": 700, "T": 90, "lengths": (700, 300), "window": 50},
    "a cap": {"cap": 3.0},
    "sinks": {"sinks": True},
    "sinks in parts": {"context": 700, "T": 5, "lengths": (700, 257), "sinks": True},
    "odd head": {"size": 40},
    "small head": {"size": 8},
    "all of it": {"window": 11, "cap": 2.0, "sinks": True, "T": 33, "heads": 6},
}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_it_is_masked_attention_and_so_is_its_gradient(case: str, dtype: torch.dtype) -> None:
    given: dict[str, Any] = {
        "heads": 4, "key_heads": 2, "size": 32, "T": 13, "context": 40, "contexts": 2,
        "rows": (0, 1), "lengths": (40, 17), "window": 0, "cap": 0.0, "sinks": False,
    } | CASES[case]  # fmt: skip
    samples, heads, key_heads = len(given["rows"]), given["heads"], given["key_heads"]
    T, size, context = given["T"], given["size"], given["context"]
    # As projections leave them: tokens first, then heads.
    q = drawn(samples, T, heads, size, dtype=dtype, seed=1).transpose(1, 2)
    k, v = (drawn(samples, T, key_heads, size, dtype=dtype, seed=n).transpose(1, 2) for n in (2, 3))
    frozen = None
    if given["contexts"]:
        frozen = Frozen(
            drawn(given["contexts"], context, key_heads, size, dtype=dtype, seed=4).transpose(1, 2),
            drawn(given["contexts"], key_heads, context, size, dtype=dtype, seed=5),
            torch.tensor(given["rows"], device=DEVICE),
            torch.tensor(given["lengths"], device=DEVICE),
        )
    leaves = [q, k, v]
    sinks = drawn(heads, dtype=dtype, seed=6) if given["sinks"] else None
    if sinks is not None:
        leaves.append(sinks)
    rule = Rule(size**-0.5, given["window"], given["cap"])
    of_result = drawn(samples, T, heads, size, dtype=dtype, seed=7)
    found = []
    for function in (attend, attended):
        for leaf in leaves:
            leaf.requires_grad_()
        result = function(q, k, v, frozen, rule, sinks)
        gradients = torch.autograd.grad(result, leaves, of_result.to(result.dtype))
        found.append([result.detach(), *gradients])
    noise = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for name, one, other in zip(("out", "q", "k", "v", "sinks"), *found, strict=False):
        largest = float(other.double().abs().max())
        away = float((one.double() - other.double()).abs().max())
        assert away <= noise * largest + 1e-6, (name, away, largest)

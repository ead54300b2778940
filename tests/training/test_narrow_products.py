"""Products of 16-bit floats by way of float32: exact but for one rounding, whatever the shapes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apollo_trainer.training import narrow_products
from apollo_trainer.training.narrow_products import wide_product

SIDES = st.integers(0, 40)


@given(st.tuples(SIDES, SIDES, SIDES), st.tuples(st.booleans(), st.booleans()), st.integers(1, 700))
def test_parts_sum_to_the_product(
    sides: tuple[int, int, int], turned: tuple[bool, bool], part: int
) -> None:
    rows, inner, columns = sides
    draw = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, int], *, turn: bool) -> torch.Tensor:
        made = torch.randn(shape[::-1] if turn else shape, generator=draw).bfloat16()
        return made.mT if turn else made

    left = drawn((rows, inner), turn=turned[0])
    right = drawn((inner, columns), turn=turned[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow_products, "PART_ELEMENTS", part)
        found = wide_product(left, right)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=0, atol=1e-4)


# Of a process of its own: torch is changed for good.
CHANGED = """
import torch
from torch.nn.functional import linear
from apollo_trainer.training import narrow_products

narrow_products._fast = lambda: {torch.bfloat16: False, torch.float16: False}
draw = torch.Generator().manual_seed(0)
x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((2, 9, 33), (70, 33), (70,)))

def learned(dtype):
    mine = [each.to(dtype, copy=True).requires_grad_() for each in (x, weight, bias)]
    linear(*mine).square().sum().backward()
    linear(mine[0], mine[1]).sum().backward()
    return [each.grad for each in mine]

single = learned(torch.float32)
narrow = {dtype: learned(dtype) for dtype in (torch.bfloat16, torch.float16)}
first, again = (narrow_products.widen_narrow_products() for _ in range(2))
assert first is again is not None
assert all(map(torch.equal, learned(torch.float32), single))
for dtype, before in narrow.items():
    for got, old, expected in zip(learned(dtype), before, single, strict=True):
        assert got.dtype is dtype
        assert (got - expected).norm() <= 1.05 * (old - expected).norm()
    x16, w16 = x[0].to(dtype), weight.to(dtype).T
    product = torch.addmm(torch.full((70,), torch.nan, dtype=dtype), x16, w16, beta=0, alpha=2)
    torch.testing.assert_close(product, (2 * (x16.float() @ w16.float())).to(dtype))
try:
    torch.mm(x[0], weight)
except RuntimeError as error:
    print("refused:", error)
"""


def test_torch_computes_them_so_and_all_else_as_before() -> None:
    ran = subprocess.run([sys.executable, "-c", CHANGED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "refused: mat1 and mat2 shapes cannot be multiplied" in ran.stdout


def test_a_cpu_that_has_instructions_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = dict.fromkeys((torch.bfloat16, torch.float16), True)
    monkeypatch.setattr(narrow_products, "_fast", lambda: fast)
    assert narrow_products.widen_narrow_products.__wrapped__() is None

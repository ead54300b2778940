"""Rounding of float32 weights into bfloat16 and float16."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_trainer.optim.rounding import (
    Rounding,
    join_halves,
    round_nearest,
    round_stochastic,
    split_halves,
)

ALL_BITS = torch.arange(2**16, dtype=torch.int32)
LOW_DTYPES = [torch.bfloat16, torch.float16]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _value(x: float) -> torch.Tensor:
    return torch.full((2**16,), x, dtype=torch.float32)


@settings(max_examples=60, deadline=None)
@given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100))
def test_bfloat16_is_exact_on_average(x):
    rounded = round_stochastic(_value(x), torch.bfloat16, ALL_BITS)
    assert rounded.double().mean().item() == torch.tensor(x, dtype=torch.float32).item()
    assert len(rounded.view(torch.int16).unique()) <= 2


@pytest.mark.parametrize("x", [1.0, 1.0003, -0.02, 6.0e-5, 3.3e-6, -5.5e-7, 1234.56, 60001.0])
def test_float16_is_exact_on_average(x):
    rounded = round_stochastic(_value(x), torch.float16, ALL_BITS).double()
    neighbours = rounded.unique()
    assert len(neighbours) <= 2
    assert neighbours[0] <= x <= neighbours[-1] or len(neighbours) == 1
    gap = float(neighbours[-1] - neighbours[0])
    assert rounded.mean().item() == pytest.approx(x, abs=gap * 2.0**-12 + abs(x) * 1e-7)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_what_fits_never_moves(dtype):
    x = torch.linspace(-4, 4, 2**16).to(dtype)
    assert torch.equal(round_stochastic(x.float(), dtype, ALL_BITS), x)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_what_is_not_finite_passes_and_the_rest_saturates(dtype):
    largest = torch.finfo(dtype).max
    beyond = torch.finfo(torch.float32).max if dtype == torch.bfloat16 else 1e6
    x = torch.tensor([math.nan, math.inf, -math.inf, beyond, -beyond, 0.0, -0.0])
    expected = [math.inf, -math.inf, largest, -largest, 0.0, 0.0]
    for rounded in (
        round_stochastic(x, dtype, torch.full((7,), 0xFFFF, dtype=torch.int32)),
        round_nearest(x, dtype),
    ):
        assert rounded.dtype == dtype
        assert rounded[0].isnan()
        assert rounded[1:].tolist() == expected
        assert rounded[6].signbit()


@settings(max_examples=300, deadline=None)
@given(FINITE.filter(lambda x: abs(x) <= 3.3895e38))
def test_split_halves_join_to_the_same_bits(x):
    value = torch.tensor([x], dtype=torch.float32)
    upper, low = split_halves(value)
    assert torch.equal(join_halves(upper, low).view(torch.int32), value.view(torch.int32))
    assert (upper.float() - value).abs() <= (value.bfloat16().float() - value).abs()


def test_split_halves_saturate_and_pass():
    x = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38])
    upper, low = split_halves(x)
    joined = join_halves(upper, low)
    assert joined[0].isnan()
    assert joined[1:3].tolist() == [math.inf, -math.inf]
    assert joined[3:].isfinite().all()
    assert upper[3:].tolist() == [torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]


@pytest.mark.parametrize("mode", ["stochastic", "nearest", "split16"])
def test_float32_is_written_exactly(mode):
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    rounded, low = Rounding(mode, (1, 2), 3).round(x, torch.float32, 0)
    assert low is None
    assert torch.equal(rounded, x)


def test_draws_change_with_step_parameter_and_element_only():
    x = torch.full((64, 32), 1.001)
    rounded = Rounding("stochastic", (1, 2), 3).round(x, torch.bfloat16, 0)[0]
    again = Rounding("stochastic", (1, 2), 3).round(x[10:20], torch.bfloat16, 320)[0]
    assert torch.equal(rounded[10:20], again)
    for other in (Rounding("stochastic", (1, 3), 3), Rounding("stochastic", (1, 2), 4)):
        assert not torch.equal(rounded, other.round(x, torch.bfloat16, 0)[0])
    assert not torch.equal(rounded[:10], rounded[10:20])

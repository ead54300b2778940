"""A gradient as factors steps a parameter as the product of them does, and says the same norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.factored import Factored, joined, norm_of, total

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (24, 24), "odd": (37, 21)}
IMPLS = ["reference", "fused"]


def factors(shape: tuple[int, ...], tokens: int, dtype: torch.dtype, seed: int = 0) -> Factored:
    torch.manual_seed(seed)
    left, right = (torch.randn(tokens, side).to(dtype) for side in shape[-2:])
    if len(shape) == 2:
        return Factored(left, right)
    cuts = torch.randint(0, tokens + 1, (shape[0] - 1,)).sort().values
    # The first expert has no token.
    ends = torch.cat([torch.zeros(1), cuts[1:], torch.tensor([tokens])]).to(torch.int32)
    return Factored(left, right, ends)


def stepped(
    shape: tuple[int, ...], dtype: torch.dtype, gradients: list[Any], **options: Any
) -> Any:
    torch.manual_seed(9)
    weight = nn.Parameter(torch.randn(shape).mul(0.1).to(dtype))
    optimizer = Apollo([("w", weight)], lr=1e-2, **{"rank": 8, **options})
    optimizer.measure = True
    for gradient in gradients:
        optimizer.step(gradients={weight: gradient})
    assert optimizer.last_update_norm is not None
    return weight.detach().float(), optimizer.named_state()[0], float(optimizer.last_update_norm)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", ["channel", "mini"])
@pytest.mark.parametrize("tokens", [1, 7, 30])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (3, 24, 40), (4, 40, 24)])
def test_a_step_is_that_of_the_product(
    shape: tuple[int, ...], tokens: int, variant: Any, impl: Any
) -> None:
    gradients = [factors(shape, tokens, torch.float32, seed) for seed in range(3)]
    options = {"impl": impl, "variant": variant, "rank": 8 if variant == "channel" else 1}
    got, state, norm = stepped(shape, torch.float32, gradients, **options)
    made = [gradient.dense() for gradient in gradients]
    expected, expected_state, expected_norm = stepped(shape, torch.float32, made, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert norm == pytest.approx(expected_norm, rel=1e-4)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected_state[name], rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "split16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (3, 24, 40)])
def test_both_paths_draw_and_round_alike(
    shape: tuple[int, ...], dtype: torch.dtype, rounding: Any
) -> None:
    """They differ where rounding error of the product meets a boundary, by one step."""
    if (dtype, rounding) == (torch.float16, "split16"):
        pytest.skip("float16 has no lower half")
    gradients = [factors(shape, 7, dtype)]
    one, two = (stepped(shape, dtype, gradients, impl=impl, rounding=rounding)[0] for impl in IMPLS)
    assert (one != two).float().mean() < 0.01
    torch.testing.assert_close(one, two, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_expert_without_tokens_is_left_alone(impl: Any) -> None:
    shape = (3, 24, 40)
    torch.manual_seed(9)
    before = torch.randn(shape).mul(0.1)
    got, state, _ = stepped(shape, torch.float32, [factors(shape, 9, torch.float32)], impl=impl)
    assert torch.equal(got[0], before[0]) and not torch.equal(got[2], before[2])
    assert state["step.w"].tolist()[0] == 0 and state["step.w"].tolist()[2] == 1
    assert not state["m.w"][0].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_step_nothing(bad: float, impl: Any) -> None:
    gradient = factors((24, 40), 7, torch.float32)
    for side in (gradient.left, gradient.right):
        keep = float(side[3, 5])
        side[3, 5] = bad
        assert not norm_of(gradient).isfinite()
        got, state, norm = stepped((24, 40), torch.float32, [gradient], impl=impl)
        torch.manual_seed(9)
        assert torch.equal(got, torch.randn(24, 40).mul(0.1))
        assert norm == 0 and int(state["step.w"]) == 0 and not state["m.w"].any()
        side[3, 5] = keep


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_projected_takes_factors_too(impl: Any) -> None:
    gradient = factors((24, 40), 7, torch.float32)
    got, *_ = stepped((24, 40), torch.float32, [gradient], impl=impl, rank=None)
    expected, *_ = stepped((24, 40), torch.float32, [gradient.dense()], impl=impl, rank=None)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 24, 40)])
def test_the_norm_is_that_of_the_product(shape: tuple[int, ...]) -> None:
    gradient = factors(shape, 11, torch.bfloat16)
    exact = gradient.dense().double().norm()
    assert float(norm_of(gradient)) == pytest.approx(float(exact), rel=1e-6)
    assert gradient.shape == torch.Size(shape)


sizes = st.integers(0, 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(sizes, min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_sums_of_factors_are_sums_of_products(counts: list[list[int]], mixed: bool) -> None:
    parts = []
    for seed, experts in enumerate(counts):
        torch.manual_seed(seed)
        ends = torch.tensor(experts).cumsum(0).to(torch.int32)
        left, right = (torch.randn(sum(experts), side) for side in (5, 4))
        parts.append(Factored(left, right, ends))
    expected = torch.stack([part.dense() for part in parts]).sum(0)
    torch.testing.assert_close(joined(parts).dense(), expected)
    given_parts: list[Tensor | Factored] = [*parts]
    if mixed:
        given_parts[0] = parts[0].dense()
    found = total(given_parts)
    whole = found.dense() if isinstance(found, Factored) else found
    torch.testing.assert_close(whole, expected)

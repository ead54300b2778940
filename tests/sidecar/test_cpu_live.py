"""Experts computed from the raw weights give what a plain loop over tokens gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from apollo_sidecar.cpu_live import halves, interleaved_swiglu, live_linear, mix_experts


def by_token(hidden, weights, biases, routing, activation):
    """Each token through each of its experts, one at a time."""
    (w13, w2), (b13, b2), (scale, ids) = weights, biases, routing
    mixed = torch.zeros(hidden.shape)
    for t in range(hidden.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            up = w13[e] @ hidden[t] + (0 if b13 is None else b13[e])
            half = up.shape[0] // 2
            out = w2[e] @ (activation(up[:half]) * up[half:]) + (0 if b2 is None else b2[e])
            mixed[t] += scale[t, k] * out
    return mixed


def experts(seed, tokens, count, top, hidden=6, inner=5, biased=False):
    g = torch.Generator().manual_seed(seed)
    weights = (
        torch.randn(count, 2 * inner, hidden, generator=g),
        torch.randn(count, hidden, inner, generator=g),
    )
    biases = (None, None)
    if biased:
        shapes = ((count, 2 * inner), (count, hidden))
        biases = tuple(torch.randn(shape, generator=g) for shape in shapes)
    choice = torch.rand(tokens, count, generator=g).argsort(1)[:, :top]
    routing = (torch.rand(tokens, top, generator=g), choice)
    return torch.randn(tokens, hidden, generator=g), weights, biases, routing


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 6), st.data(), st.booleans())
def test_experts_equal_a_loop_over_tokens(seed, tokens, count, data, biased):
    top = data.draw(st.integers(1, count))
    activation = data.draw(st.sampled_from([F.silu, F.gelu]))
    case = experts(seed, tokens, count, top, biased=biased)
    mixed = mix_experts(*case, halves(activation))
    torch.testing.assert_close(mixed, by_token(*case, activation), rtol=1e-5, atol=1e-5)


def test_an_expert_that_no_token_chose_adds_nothing():
    hidden, weights, biases, (scale, ids) = experts(0, 7, 4, 2)
    ids = ids % 2
    weights[0][2:] = torch.nan
    mixed = mix_experts(hidden, weights, biases, (scale, ids), halves(F.silu))
    assert mixed.isfinite().all()


def test_a_token_that_names_an_expert_twice_counts_it_twice():
    hidden, weights, biases, _ = experts(0, 3, 4, 1)
    twice = (torch.full((3, 2), 0.5), torch.full((3, 2), 1))
    once = (torch.ones(3, 1), torch.full((3, 1), 1))
    torch.testing.assert_close(
        mix_experts(hidden, weights, biases, twice, halves(F.silu)),
        mix_experts(hidden, weights, biases, once, halves(F.silu)),
    )


def test_an_expert_id_of_no_expert_here_adds_nothing():
    hidden, weights, biases, _ = experts(0, 3, 4, 1)
    nowhere = (torch.ones(3, 1), torch.full((3, 1), -1))
    assert not mix_experts(hidden, weights, biases, nowhere, halves(F.silu)).any()


def test_bfloat16_experts_are_summed_in_float32():
    hidden, weights, biases, (scale, ids) = experts(1, 8, 4, 4)
    low = (hidden.bfloat16(), tuple(w.bfloat16() for w in weights))
    mixed = mix_experts(*low, biases, (scale, ids), halves(F.silu))
    exact = by_token(hidden, weights, biases, (scale, ids), F.silu)
    assert mixed.dtype is torch.float32
    assert float((mixed - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("changed", ["w13", "w2"])
def test_a_write_to_the_raw_weights_changes_the_next_answer(changed):
    hidden, weights, biases, routing = experts(2, 5, 3, 2)
    before = mix_experts(hidden, weights, biases, routing, halves(F.silu))
    weights[changed == "w2"].mul_(1.5)
    after = mix_experts(hidden, weights, biases, routing, halves(F.silu))
    assert not torch.allclose(before, after)


def test_gates_and_values_by_turns_are_those_of_transformers_gpt_oss():
    torch.manual_seed(4)
    both = torch.randn(5, 12) * 6
    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=2))
    torch.testing.assert_close(interleaved_swiglu(both), experts._apply_gate(both))


@pytest.mark.parametrize("biased", [False, True])
def test_an_experts_product_follows_its_weight_to_another_place(biased):
    layer = torch.nn.Module()
    layer.w2_weight = torch.nn.Parameter(torch.randn(3, 5, 4), requires_grad=False)
    if biased:
        layer.w2_bias = torch.nn.Parameter(torch.randn(3, 5), requires_grad=False)
    multiply, x = live_linear(layer, "w2", 1), torch.randn(7, 4)
    layer.w2_weight.data = torch.randn(3, 5, 4)
    expected = x @ layer.w2_weight[1].T + (layer.w2_bias[1] if biased else 0)
    torch.testing.assert_close(multiply(x), expected)

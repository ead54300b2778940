"""The gated delta rule in blocks, against transformers' own code: results, states, gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as file

from apollo_trainer.training import gated_delta
from apollo_trainer.training.delta_rule import NAME
from apollo_trainer.training.gated_delta import gated_delta_rule

OWN = inspect.unwrap(getattr(file, NAME))
HEADS, KEYS, VALUES = 3, 16, 24


@pytest.mark.parametrize("block", [256, 7])
@pytest.mark.parametrize("normal", [True, False])
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("tokens", [1, 63, 64, 200, 300])
def test_it_says_what_transformers_says(
    tokens: int, begun: bool, normal: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_delta, "BLOCK", block)
    draw = torch.Generator().manual_seed(tokens)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=draw, dtype=torch.float64)

    query, key = (drawn(tokens, HEADS, KEYS) * (1 if normal else 0.2) for _ in range(2))
    g, beta = -drawn(tokens, HEADS).exp(), drawn(tokens, HEADS).sigmoid()
    leaves = [query, key, drawn(tokens, HEADS, VALUES), g, beta, drawn(HEADS, KEYS, VALUES)]
    leaves = [leaf.float().requires_grad_() for leaf in leaves[: 6 if begun else 5]]
    weights = drawn(tokens, HEADS, VALUES).float(), drawn(HEADS, KEYS, VALUES).float()
    found = []
    for rule in (gated_delta_rule, OWN):
        result = rule(
            *leaves[:5],
            initial_state=leaves[5] if begun else None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=normal,
        )
        told = sum((one * weight).sum() for one, weight in zip(result, weights, strict=True))
        found.append([*result, *torch.autograd.grad(told, leaves)])
    for one, other in zip(*found, strict=True):
        assert one.dtype is torch.float32
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6


def test_of_narrow_floats_the_outputs_are_narrow_and_no_state_is_given_unasked() -> None:
    given = [torch.randn(1, 9, 2, 4, dtype=torch.bfloat16) for _ in range(3)]
    rates = torch.rand(1, 9, 2, dtype=torch.bfloat16)
    output, state = gated_delta_rule(*given, -rates, rates, use_qk_l2norm_in_kernel=True)
    assert (output.dtype, output.shape, state) == (torch.bfloat16, (1, 9, 2, 4), None)
    assert output.is_contiguous()

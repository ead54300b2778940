"""Latent attention is shared where it decodes with the weight itself, and refused elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from apollo_grpc.errors import FailedPrecondition
from apollo_sidecar.memfd_weights import MemfdWeights
from apollo_sidecar.refusals import require_live_latents

HEADS, LATENT, NOPE, VALUE = 2, 8, 4, 3
CONFIG = SimpleNamespace(model_config=SimpleNamespace(use_mla=True))


class Latent(nn.Module):
    """vLLM's layer after loading; `kept` is what it makes of each of the two matrices."""

    def __init__(self, kept: Any, *, sparse: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.kv_b_proj = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False)
        self.kv_b_proj.weight.requires_grad_(False)
        self.impl = SimpleNamespace(is_sparse=sparse)
        keys, values = self.matrices()
        self.W_UK_T, self.W_UV = kept(keys.permute(1, 2, 0)), kept(values.transpose(0, 1))

    def matrices(self) -> tuple[torch.Tensor, ...]:
        weight = self.kv_b_proj.weight.detach().T.view(LATENT, HEADS, NOPE + VALUE)
        return weight.split([NOPE, VALUE], dim=-1)


def as_parameter(matrix: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(matrix, requires_grad=False)


def as_attribute(matrix: torch.Tensor) -> torch.Tensor:
    return matrix


def refusal_of(model: nn.Module, config: Any = CONFIG) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        require_live_latents(model, config)
    assert caught.value.reason == "LATENT_ATTENTION"
    return caught.value


@pytest.mark.parametrize("kept", [as_parameter, as_attribute])
def test_what_is_written_into_the_weight_is_decoded_with_once_it_has_moved(kept):
    model = nn.Sequential(Latent(kept))
    live = MemfdWeights(model)
    require_live_latents(model, CONFIG)
    (layer,) = model
    place = next(t for t in live.tensors if t.name == "0.kv_b_proj.weight")
    live.view(place).copy_(torch.randn(place.shape))
    keys, values = layer.matrices()
    assert torch.equal(layer.W_UK_T, keys.permute(1, 2, 0))
    assert torch.equal(layer.W_UV, values.transpose(0, 1))


@pytest.mark.parametrize("kept", [lambda m: as_parameter(m.clone()), lambda m: m.clone()])
def test_copies_are_refused_and_another_backend_is_told(kept):
    model = nn.Sequential(Latent(as_parameter), Latent(kept))
    MemfdWeights(model)
    message = refusal_of(model).message
    assert "1 decodes with copies" in message
    assert "--attention-backend" in message


def test_a_backend_that_packs_the_weight_and_drops_it_is_refused():
    layer = Latent(lambda matrix: None)
    layer.kv_b_proj.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    assert "CPU_MLA" in refusal_of(layer).message


def test_attention_to_what_an_indexer_picks_is_refused():
    assert "indexer" in refusal_of(Latent(as_parameter, sparse=True)).message


def test_latent_attention_in_layers_that_are_not_known_is_refused():
    refusal_of(nn.Linear(3, 3))


def test_other_models_are_taken():
    plain = SimpleNamespace(model_config=SimpleNamespace(use_mla=False))
    require_live_latents(nn.Linear(3, 3), plain)

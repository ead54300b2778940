"""Two ranks compute with their parts what one process computes with the whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.region import Region
from apollo_trainer.optim import Apollo
from apollo_trainer.optim.factored import Factored
from apollo_trainer.parallel.parts import NO_REGIONS, part_of
from apollo_trainer.parallel.ranks import ALONE
from apollo_trainer.training.batch import plan_batches
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.gradients import StepGradients, backward
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step
from apollo_trainer.training.teacher import top_tokens
from apollo_trainer.weights.verify import log_probabilities
from tests.parallel.divided import FAMILIES, divided_model, regions_of, whole_model
from tests.parallel.two_ranks import DEVICES, on_one, on_two_ranks

STEPS = 10
IDS = [(7 * i + 3) % 259 for i in range(24)]
SAMPLES = [
    TokenizedSample((5, 17, 200, 250, 9), (258, 3, 170, 40)),
    TokenizedSample((161, 2), (99, 159, 160), weight=2.0),
    TokenizedSample((8, 8, 1, 255), (12,)),
]


def of_all_losses(model):
    """A teacher's tokens, then a batch with each kind of loss."""
    told = top_tokens(model, SAMPLES[:1], 4)
    moved = replace(told[0], log_probs=torch.log_softmax(told[0].log_probs.flip(1) + 0.3, 1) - 0.4)
    return told, [
        replace(SAMPLES[0], targets=moved),
        replace(SAMPLES[1], advantages=(1.0, -0.5, 0.3), sampler_log_probs=(-5.0, -5.6, -4.9)),
        SAMPLES[2],
    ]


def passes(model, samples):
    """Loss, figures and gradients of one backward pass over samples."""
    (batch,) = plan_batches(samples, 10**6, mixing_of(model))
    collected = StepGradients(list(dict.fromkeys(model.parameters())))
    with collected.collecting():
        weighted, sums = batch_loss(model, batch, FrozenContexts(model), 3.0)
        backward(weighted)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g for p, g in collected.settle().items()}
    dense = {n: g.dense() if isinstance(g, Factored) else g.float() for n, g in found.items()}
    return weighted.detach(), sums, dense


def trained(model, ranks, regions):
    """Weights, moments and losses after some steps."""
    optimizer = Apollo(
        model.named_parameters(), lr=1e-3, rank=8, seed=4, regions=regions, ranks=ranks
    )
    optimizer.measure = True
    policy, losses = StepPolicy(token_budget=64), []
    for step in range(STEPS):
        # Clipped at some steps, which previews and prepares anew.
        each = replace(policy, clip_grad_norm=0.5) if step % 3 == 2 else policy
        result = take_step(model, optimizer, SAMPLES, each)
        losses += [result.loss, result.grad_norm, result.update_norm]
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return weights, optimizer.named_state()[0], losses


def everything(ranks, device):
    torch.set_num_threads(1)
    found = {}
    for family in FAMILIES:
        alone = ranks is ALONE
        model = (whole_model(family) if alone else divided_model(family, ranks)).to(device)
        regions = NO_REGIONS if alone else regions_of(whole_model(family), ranks.rank)
        told, samples = of_all_losses(model)
        found[family] = {
            "scores": log_probabilities(model, IDS),
            "top": (told[0].ids, told[0].log_probs),
            "passes": passes(model, samples),
            "mixing": mixing_of(model).name,
            "trained": trained(model, ranks, regions),
        }
    return found


@pytest.fixture(scope="module", params=DEVICES)
def found(request):
    return on_two_ranks(everything, request.param), on_one(everything, request.param)


@pytest.fixture(params=FAMILIES)
def case(request, found):
    """What both ranks and one process found of a family, and the ranks' regions."""
    together, alone = found
    regions = [regions_of(whole_model(request.param), rank) for rank in (0, 1)]
    return [each[request.param] for each in together], alone[request.param], regions


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


def test_each_token_is_scored_alike(case):
    together, alone, _ = case
    for each in together:
        close(each["scores"], alone["scores"])
        assert each["mixing"] == alone["mixing"]


def test_the_likeliest_tokens_are_those_of_the_whole_vocabulary(case):
    together, alone, _ = case
    for each in together:
        assert torch.equal(each["top"][0], alone["top"][0])
        close(each["top"][1], alone["top"][1])


def test_losses_of_every_kind_are_those_of_one_process(case):
    together, alone, _ = case
    for each in together:
        close(each["passes"][0], alone["passes"][0])
        close(each["passes"][1], alone["passes"][1])


def test_gradients_are_the_parts_of_those_of_one_process(case):
    together, alone, regions = case
    for rank, each in enumerate(together):
        gradients = each["passes"][2]
        assert gradients.keys() == alone["passes"][2].keys()
        for name, gradient in gradients.items():
            close(gradient, part_of(alone["passes"][2][name], regions[rank][name]), msg=name)


def test_ten_steps_are_those_of_one_process(case):
    together, alone, regions = case
    for rank, each in enumerate(together):
        weights, state, told = each["trained"]
        assert told == pytest.approx(alone["trained"][2], rel=1e-4)
        for name, own in weights.items():
            close(own, part_of(alone["trained"][0][name], regions[rank][name]), msg=name)
        for key, own in state.items():
            close(own, alone["trained"][1][key], msg=key)


def test_what_all_ranks_have_stays_the_same_bit_for_bit(case):
    (first, second), _, regions = case
    alike = [name for name, region in regions[0].items() if region.complete]
    assert alike
    for name in alike:
        assert torch.equal(first["trained"][0][name], second["trained"][0][name]), name


def shifted(regions, name):
    """Two ranks' regions of one parameter, exchanged."""
    return regions[0] | {name: regions[1][name]}


MOE = "model.layers.0.mlp.experts"
MISPLACED = {
    "other heads": ("Qwen3, tied", "model.layers.0.self_attn.k_proj.weight"),
    "other inputs": ("Qwen3, tied", "model.layers.1.mlp.down_proj.weight"),
    "a bias of other rows": ("Llama", "model.layers.0.self_attn.q_proj.bias"),
    "other rows of experts": ("Qwen3-MoE", f"{MOE}.gate_up_proj"),
}


@pytest.mark.parametrize("way", MISPLACED)
def test_parts_that_do_not_belong_together_are_refused_by_name(way):
    family, name = MISPLACED[way]
    whole = whole_model(family)
    regions = shifted([regions_of(whole, rank) for rank in (0, 1)], name)
    assert name.rpartition(".")[0].rpartition(".")[0] in refused(family, regions)


def test_experts_that_each_rank_has_some_of_are_refused_by_name():
    whole = whole_model("Qwen3-MoE")
    regions = regions_of(whole, 0)
    for name in (f"{MOE}.gate_up_proj", f"{MOE}.down_proj"):
        root = regions[name].root
        regions[name] = Region(root, (((0, 2),), *Region.whole_of(root).runs[1:]))
    assert MOE in refused("Qwen3-MoE", regions)


def test_a_style_that_is_not_known_and_a_part_without_one_are_refused_by_name(monkeypatch):
    regions = regions_of(whole_model("Qwen3, tied"), 0)
    root = regions["model.norm.weight"].root
    cut = regions | {"model.norm.weight": Region(root, (((0, root[0] // 2),),))}
    assert "model.norm.weight" in refused("Qwen3, tied", cut)
    config = FAMILIES["Qwen3, tied"]
    plan = config.base_model_tp_plan | {"layers.*.mlp.up_proj": "sequence_parallel"}
    monkeypatch.setattr(config, "base_model_tp_plan", plan)
    assert "'sequence_parallel' is not known" in refused("Qwen3, tied", regions)


def refused(family, regions):
    with pytest.raises(FailedPrecondition) as error:
        divided_model(family, ALONE, regions)
    assert error.value.reason == "TENSOR_PARALLEL_UNSUPPORTED"
    return error.value.message

"""Which parameters learn, and that the others stay bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_trainer.optim import Apollo
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.filter import chosen, layer_of, learning_only
from apollo_trainer.training.gradients import StepGradients
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step

Make = Callable[[str], Any]
ONE = TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30))
# Gradients of it are made, not kept as factors.
LONG = TokenizedSample((3, 50), tuple(range(100, 130)))
NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.experts.0.up_proj.weight",
    "model.layers.11.self_attn.q_proj.bias",
    "model.norm.weight",
    "transformer.h.1.mlp.c_fc.weight",
]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"include": ["*.weight"]}, [0, 1, 2, 4, 5]),
        ({"include": ["*mlp*", "*norm*"], "exclude": ["*experts*"]}, [1, 4, 5]),
        ({"exclude": ["model.*"]}, [5]),
        ({"layers": [1]}, [2, 5]),
        ({"layers": [0, 11]}, [1, 3]),
        ({"include": ["*experts*"], "layers": [0]}, []),
        ({"include": ["*.MLP.*"]}, []),
        ({"include": ["*.layers.[01].*"]}, [1, 2]),
    ],
)
def test_names_are_chosen_by_patterns_and_layers(asked: Any, expected: list[int]) -> None:
    assert chosen(NAMES, **asked) == {NAMES[n] for n in expected}


def test_the_layer_is_the_first_number_that_stands_alone() -> None:
    assert [layer_of(name) for name in NAMES] == [None, 0, 1, 11, None, 1]
    assert layer_of("model.layers.h2o.w8") is None


def everything(model: Any, optimizer: Apollo) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | optimizer.named_state()[0]
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def moved(
    model: Any, samples: list[TokenizedSample], names: frozenset[str], **how: Any
) -> set[str]:
    """Names whose weights or state have other bits after two steps in which only some learn."""
    optimizer = Apollo(model.named_parameters(), rank=8, lr=1e-3, weight_decay=0.5, **how)
    take_step(model, optimizer, samples)
    before = everything(model, optimizer)
    with learning_only(model, names):
        for _ in range(2):
            take_step(model, optimizer, samples, StepPolicy(64))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    after = everything(model, optimizer)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("samples", [[ONE], [LONG]], ids=["factors", "made"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(
    "asked",
    [{"layers": [1]}, {"include": ["*norm*", "*ln_*"]}, {"include": ["*mlp*"], "layers": [0]}],
    ids=["layer", "norms", "one layer's products"],
)
def test_all_others_stay_bit_for_bit(
    make_model: Make, family: str, samples: list[TokenizedSample], asked: Any, impl: Any
) -> None:
    model = make_model(family)
    names = chosen((name for name, _ in model.named_parameters()), **asked)
    assert 0 < len(names) < len(list(model.parameters()))
    found = moved(model, samples, names, impl=impl)
    parameters = set(dict(model.named_parameters()))
    assert found & parameters == names
    assert {name.split(".", 1)[1] for name in found - parameters} == names


def test_the_others_have_no_gradient_and_the_step_is_that_of_these_alone(make_model: Make) -> None:
    model = make_model("qwen3")
    optimizer = Apollo(model.named_parameters(), rank=8)
    names = chosen((name for name, _ in model.named_parameters()), layers=[1])
    whole = take_step(model, optimizer, [ONE], StepPolicy(dry_run=True))
    with learning_only(model, names):
        part = take_step(model, optimizer, [ONE], StepPolicy(dry_run=True))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert part.loss == whole.loss and 0 < part.grad_norm < whole.grad_norm


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("tied", ["one parameter", "two over one memory"])
def test_what_is_tied_learns_by_either_name(make_model: Make, tied: str, name: str) -> None:
    model = make_model("qwen3")
    if tied == "two over one memory":
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach())
    with learning_only(model, {name}):
        assert model.model.embed_tokens.weight.requires_grad
        assert model.lm_head.weight.requires_grad
        assert not model.model.norm.weight.requires_grad


def test_a_name_that_is_not_there_changes_nothing(make_model: Make) -> None:
    model = make_model("qwen3")
    with pytest.raises(KeyError, match="nobody"), learning_only(model, {"nobody"}):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_had_no_gradient_before_has_none_inside_and_after(make_model: Make) -> None:
    model = make_model("qwen3")
    norm = model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), learning_only(model, {"model.norm.weight"}):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise ZeroDivisionError
    assert [p for p in model.parameters() if not p.requires_grad] == [norm]


def test_a_step_that_meets_nothing_that_learns_writes_nothing(make_model: Make) -> None:
    model = make_model("qwen3")
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    assert moved(model, [ONE], frozenset({"unused"})) == set()


def test_a_parameter_that_learns_late_is_corrected_by_its_own_steps(make_model: Make) -> None:
    """Its first step is as long as any other's first: Adam's bias is corrected by its own count."""
    late, early = make_model("qwen3"), make_model("qwen3")
    name = "model.norm.weight"
    optimizers = [
        Apollo(m.named_parameters(), rank=8, lr=1e-3, weight_decay=0.0) for m in (late, early)
    ]
    with learning_only(late, frozenset({"model.layers.0.mlp.up_proj.weight"})):
        for _ in range(5):
            take_step(late, optimizers[0], [ONE])
    for model, optimizer in zip((late, early), optimizers, strict=True):
        before = dict(model.named_parameters())[name].detach().clone()
        with learning_only(model, {name}):
            take_step(model, optimizer, [ONE])
        change = dict(model.named_parameters())[name].detach() - before
        torch.testing.assert_close(change.abs(), torch.full_like(change, 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("same", [True, False])
def test_graphs_of_other_parameters_are_let_go(
    make_model: Make, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: the graph is a stand-in, and is asked for as the passes do."""
    model = make_model("qwen3")
    passes, batch = CapturedPasses(model), SimpleNamespace(keeps_contexts=True)
    passes.take(batch, 1.0, StepGradients(model.parameters()), alone=True)  # type: ignore[arg-type]
    passes._graphs["a bucket"] = object()  # type: ignore[index, assignment]
    with nullcontext() if same else learning_only(model, {"model.norm.weight"}):
        passes.take(batch, 1.0, StepGradients(model.parameters()), alone=True)  # type: ignore[arg-type]
    assert len(passes) == same

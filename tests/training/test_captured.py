"""Passes as CUDA graphs: the losses, gradients and refusals of the passes themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.guard import Guard, UpdateRefused
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, take_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Make = Callable[[str], Any]
ONE = TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30))
OTHER = TokenizedSample((11, 12), (13, 14), 2.0)
LIKE_ONE = TokenizedSample((5, 51, 8, 90), (141, 3, 78, 31))


def on_gpu(make_model: Make, family: str, dtype: torch.dtype = torch.float32) -> Any:
    return make_model(family).to("cuda", dtype)


def optimizer_of(model: Any, lr: float = 1e-3) -> Apollo:
    optimizer = Apollo(model.named_parameters(), rank=8, seed=5, lr=lr)
    optimizer.measure = True
    return optimizer


@pytest.mark.parametrize("samples", [[ONE], [ONE, OTHER]], ids=["one", "two"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt"])
def test_fifty_steps_lose_what_they_lose_without(
    make_model: Make, family: str, samples: list[TokenizedSample]
) -> None:
    losses = []
    for captured in (False, True):
        model = on_gpu(make_model, family)
        passes = CapturedPasses(model) if captured else None
        optimizer = optimizer_of(model)
        losses.append([take_step(model, optimizer, samples, passes=passes).loss for _ in range(50)])
        assert passes is None or (len(passes) == 1 and not passes.refusal)
    assert losses[1] == pytest.approx(losses[0], rel=0.02, abs=0.01)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_what_attends_to_a_window_runs_as_it_is(make_model: Make, family: str) -> None:
    """Its window is shorter than the bucket: padding would be counted as places."""
    model = on_gpu(make_model, family)
    optimizer, passes = optimizer_of(model), CapturedPasses(model)
    losses = [take_step(model, optimizer, [ONE], passes=passes).loss for _ in range(20)]
    assert not len(passes) and not passes.refusal and losses[-1] < losses[0]


def test_two_buckets_and_micro_batches_take_turns(make_model: Make) -> None:
    results = []
    for captured in (False, True):
        model = on_gpu(make_model, "qwen3")
        passes = CapturedPasses(model) if captured else None
        optimizer, told = optimizer_of(model), []
        for _ in range(4):
            for samples, budget in (([ONE], 1024), ([LIKE_ONE, OTHER], 4), ([OTHER], 1024)):
                policy = StepPolicy(token_budget=budget)
                told.append(take_step(model, optimizer, samples, policy, passes=passes))
        results.append([(r.loss, r.grad_norm) for r in told])
    for one, other in zip(*results, strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def test_nothing_is_written_where_the_guard_refuses(make_model: Make) -> None:
    model = on_gpu(make_model, "qwen3")
    optimizer, passes = optimizer_of(model), CapturedPasses(model)
    for _ in range(3):
        take_step(model, optimizer, [ONE], passes=passes)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UpdateRefused):
        take_step(model, optimizer, [ONE], StepPolicy(guard=Guard(max_loss=1e-9)), passes=passes)
    dry = take_step(model, optimizer, [ONE], StepPolicy(dry_run=True), passes=passes)
    assert all(map(torch.equal, before, model.parameters()))
    assert take_step(model, optimizer, [ONE], passes=passes).loss == pytest.approx(dry.loss)


def test_a_nan_is_seen(make_model: Make) -> None:
    model = on_gpu(make_model, "qwen3")
    optimizer, passes = optimizer_of(model), CapturedPasses(model)
    for _ in range(3):
        take_step(model, optimizer, [ONE], passes=passes)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UpdateRefused):
        take_step(model, optimizer, [ONE], passes=passes)


def test_what_waits_for_the_host_runs_as_it_is_and_says_so(make_model: Make) -> None:
    model = on_gpu(make_model, "qwen3")
    model.model.norm.register_forward_hook(lambda *a: float(a[2].sum()) and None)
    optimizer, passes = optimizer_of(model), CapturedPasses(model)
    losses = [take_step(model, optimizer, [ONE], passes=passes).loss for _ in range(20)]
    assert passes.refusal and not len(passes)
    assert losses[-1] < losses[0]


def test_a_graph_that_says_something_else_is_not_used(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_gpu(make_model, "qwen3")
    optimizer, passes = optimizer_of(model), CapturedPasses(model)
    said = CapturedPasses._said
    answers = iter(range(100))
    monkeypatch.setattr(CapturedPasses, "_said", lambda *a: [x + next(answers) for x in said(*a)])
    plain = [take_step(model, optimizer, [ONE], passes=passes).loss for _ in range(3)]
    assert "something else" in passes.refusal and plain[-1] < plain[0]


def test_graphs_are_let_go_of(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollo_trainer.training.captured._MOST", 2)
    model = on_gpu(make_model, "qwen3")
    optimizer, passes = optimizer_of(model, 0.0), CapturedPasses(model)
    samples = [TokenizedSample((3, 4), tuple(range(10, 10 + n))) for n in (2, 20, 33)]
    for sample in (*samples, *samples, samples[2]):
        take_step(model, optimizer, [sample], passes=passes)
    assert len(passes) == 2

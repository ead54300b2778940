"""Passes as CUDA graphs: the losses, gradients and refusals of the passes themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.attention import NAME
from apollo_trainer.training.batch import Mixing, plan_batches
from apollo_trainer.training.capture import TOLERANCE, Capture
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.delta_rule import choose_delta_rule
from apollo_trainer.training.faster import speed_up
from apollo_trainer.training.gradients import StepGradients
from apollo_trainer.training.guard import Guard, UpdateRefused
from apollo_trainer.training.loss import continuation_loss
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


def of_lengths(*lengths: tuple[int, int]) -> list[TokenizedSample]:
    """Samples of so many context and continuation tokens."""
    draw = random.Random(7)
    return [
        TokenizedSample(*(tuple(draw.choices(range(1, 259), k=size)) for size in pair))
        for pair in lengths
    ]


# Each twice and more in one bucket, with other lengths; windows and chunks are of 6 tokens.
WIDE = [
    of_lengths((39, 12)),
    of_lengths((39, 12)),
    of_lengths((35, 5)),
    of_lengths((20, 5), (4, 12)),
    of_lengths((31, 16), (9, 3)),
    of_lengths((24, 2), (3, 15)),
    of_lengths((1, 14), (1, 3)),
    of_lengths((1, 9), (1, 16)),
]
# torch multiplies experts in float32 by a loop that waits for the host.
WINDOWED = [
    (family, dtype)
    for family in ("mistral", "gemma2", "gemma2_capped", "gemma3", "qwen2", "llama4", "gpt_oss")
    for dtype in (torch.float32, torch.bfloat16)
    if (family, dtype) != ("gpt_oss", torch.float32)
]


@pytest.mark.parametrize(("family", "dtype"), WINDOWED)
def test_windows_caps_and_sinks_are_captured(
    make_model: Make, family: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Against the model's own code, or torch's, that knows no contexts apart and no group."""
    caplog.set_level("INFO")  # why there is no graph
    told = []
    for captured in (False, True):
        model = on_gpu(make_model, family, dtype)
        if family == "gemma2":
            model.set_attn_implementation("eager")
        passes = None
        if captured:
            choose_delta_rule(model)
            speed_up(model)
            assert model.config._attn_implementation == NAME
            passes = CapturedPasses(model)
        optimizer = optimizer_of(model, 0.0)
        results = [take_step(model, optimizer, samples, passes=passes) for samples in WIDE]
        told.append([(r.loss, r.grad_norm) for r in results])
        if passes is not None:
            assert passes.refusal == ""
            assert len(passes) == 3
    bound = 1e-3 if dtype == torch.float32 else TOLERANCE
    for samples, one, other in zip(WIDE, *told, strict=True):
        lengths = [(len(s.context_ids), len(s.continuation_ids)) for s in samples]
        assert other == pytest.approx(one, rel=bound), lengths


def test_each_sample_of_a_window_has_its_own_loss(make_model: Make) -> None:
    """The sums by sample, where the mean over a step would hide one row's among the others."""
    model = on_gpu(make_model, "gemma3")
    choose_delta_rule(model)
    speed_up(model)
    passes = CapturedPasses(model)
    samples = of_lengths((39, 12), (4, 3), (12, 16), (25, 9))
    (batch,) = plan_batches(samples, 10**6, Mixing.PADDED)
    for _ in range(3):
        sums = passes.take(batch, 1.0, StepGradients(model.parameters()), alone=True)
    assert sums is not None, passes.refusal
    expected = [continuation_loss(model, sample).loss_sum for sample in batch.samples]
    (losses,) = sums.tolist()
    assert losses == pytest.approx(expected, rel=1e-4)


def test_what_counts_padding_in_a_long_row_runs_as_it_is_and_says_so(make_model: Make) -> None:
    model = on_gpu(make_model, "llama4")
    model.config.attn_temperature_tuning, model.config.floor_scale = True, 40
    optimizer, passes = optimizer_of(model), CapturedPasses(model)
    for samples in (WIDE[0], WIDE[0], [ONE], [ONE]):
        take_step(model, optimizer, samples, passes=passes)
    assert len(passes) == 1
    assert "(1)" in passes.refusal and "from 40 places on" in passes.refusal


def test_memory_that_was_freed_is_tried_again(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_gpu(make_model, "qwen3")
    optimizer, passes = optimizer_of(model, 0.0), CapturedPasses(model)
    tried = Mock(side_effect=torch.OutOfMemoryError)
    held = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.uint8, device="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(passes._capture, "_captured", tried)
        for _ in range(4):
            take_step(model, optimizer, [ONE], passes=passes)
        assert tried.call_count == 1
        assert "no memory" in passes.refusal and not len(passes)
        # Freeing what graphs hold is tried again at once; here there are none, and it fails again.
        passes.let_go()
        assert passes.refusal == ""
        for _ in range(2):
            take_step(model, optimizer, [ONE], passes=passes)
        assert tried.call_count == 2
    take_step(model, optimizer, [ONE], passes=passes)
    assert not len(passes)
    del held
    take_step(model, optimizer, [ONE], passes=passes)
    assert len(passes) == 1 and passes.refusal == ""


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
    said = Capture._said
    answers = iter(range(100))
    monkeypatch.setattr(Capture, "_said", lambda *a: [x + next(answers) for x in said(*a)])
    plain = [take_step(model, optimizer, [ONE], passes=passes).loss for _ in range(3)]
    assert "something else" in passes.refusal and plain[-1] < plain[0]


def test_a_model_that_keeps_states_is_captured(make_model: Make) -> None:
    losses = []
    for captured in (False, True):
        model = on_gpu(make_model, "qwen3_next", torch.bfloat16)
        choose_delta_rule(model)
        passes = CapturedPasses(model) if captured else None
        optimizer = optimizer_of(model)
        losses.append([take_step(model, optimizer, [ONE], passes=passes).loss for _ in range(20)])
        assert passes is None or (len(passes) == 1 and not passes.refusal)
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE, abs=TOLERANCE)


def test_lengths_that_come_as_often_as_others_do_not_take_their_place(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apollo_trainer.training.captured._MOST", 2)
    model = on_gpu(make_model, "qwen3")
    optimizer, passes = optimizer_of(model, 0.0), CapturedPasses(model)
    capture, captured = passes._capture.of, []
    monkeypatch.setattr(passes._capture, "of", lambda *a: captured.append(a[0]) or capture(*a))
    samples = [TokenizedSample((3, 4), tuple(range(10, 10 + n))) for n in (2, 20, 33)]
    for sample in samples * 8:
        take_step(model, optimizer, [sample], passes=passes)
    assert len(captured) == len(passes) == 2
    for _ in range(20):
        take_step(model, optimizer, samples[2:], passes=passes)
    assert len(captured) == 3 and len(passes) == 2


def test_graphs_are_let_go_of(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollo_trainer.training.captured._MOST", 2)
    model = on_gpu(make_model, "qwen3")
    optimizer, passes = optimizer_of(model, 0.0), CapturedPasses(model)
    samples = [TokenizedSample((3, 4), tuple(range(10, 10 + n))) for n in (2, 20, 33)]
    for sample in (*samples, *samples, *samples[2:] * 3):
        take_step(model, optimizer, [sample], passes=passes)
    assert len(passes) == 2

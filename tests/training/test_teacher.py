"""What a model says of continuations, and learning to say it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.training.evaluate import evaluate
from apollo_trainer.training.loss import continuation_logits
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import take_step
from apollo_trainer.training.teacher import top_tokens

Make = Callable[[str], Any]
SAMPLES = [
    TokenizedSample((11,), (13, 14), teacher_context_ids=(80, 81, 82)),
    TokenizedSample((3, 50, 7, 99), (140, 2, 77)),
    TokenizedSample((5, 6), (9,), teacher_context_ids=(3, 50, 7, 98)),
]


@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_the_likeliest_are_those_after_the_teachers_context(
    make_model: Make, family: str, budget: int
) -> None:
    model = make_model(family)
    for sample, top in zip(SAMPLES, top_tokens(model, SAMPLES, 4, budget), strict=True):
        read = sample.teacher_context_ids or sample.context_ids
        with torch.no_grad():
            logits = continuation_logits(model, read, sample.continuation_ids)
        expected = logits.log_softmax(1).topk(4)
        assert (top.ids.dtype, top.log_probs.dtype) == (torch.int32, torch.float32)
        assert torch.equal(top.ids.long(), expected.indices)
        torch.testing.assert_close(top.log_probs, expected.values, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_more_than_the_vocabulary_is_all_of_it(make_model: Make) -> None:
    (top,) = top_tokens(make_model("qwen3"), SAMPLES[:1], 10**6)
    assert top.ids.shape == (2, 259) and set(top.ids[1].tolist()) == set(range(259))
    torch.testing.assert_close(top.log_probs.exp().sum(1), torch.ones(2))


def test_it_can_be_stopped_between_micro_batches(make_model: Make) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        top_tokens(make_model("qwen3"), SAMPLES, 4, before_batch=stop)


def taught(model: Any, samples: list[TokenizedSample], k: int = 20) -> list[TokenizedSample]:
    pairs = zip(samples, top_tokens(model, samples, k), strict=True)
    return [replace(sample, targets=top) for sample, top in pairs]


@pytest.mark.parametrize("k", [1, 20, 259])
def test_a_sample_without_a_teachers_context_has_nothing_to_learn(make_model: Make, k: int) -> None:
    model = make_model("qwen3")
    samples = taught(model, SAMPLES, k)
    losses = evaluate(model, samples, own_loss=True)
    assert losses[1] == pytest.approx(0.0, abs=1e-6)
    assert min(losses[0], losses[2]) > 1e-4
    assert evaluate(model, samples) == evaluate(model, SAMPLES)


def test_what_a_context_says_is_learned_without_it(make_model: Make) -> None:
    model = make_model("qwen3")
    samples = taught(model, [SAMPLES[0], SAMPLES[2]])
    optimizer = Apollo(model.named_parameters(), rank=8, lr=3e-3)
    losses = [take_step(model, optimizer, samples).loss for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]
    assert min(losses) >= 0

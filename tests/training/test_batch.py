"""Samples in one forward: planned within a budget, and equal to each sample by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_trainer.training.batch import (
    CONTEXT_TOKENS_PER_LEARNED,
    Mixing,
    frozen_context,
    plan_batches,
)
from apollo_trainer.training.frozen_context import FrozenContexts, batch_logits
from apollo_trainer.training.loss import batch_loss, continuation_loss
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.samples import TokenizedSample

Make = Callable[[str], Any]
LONG = tuple((7 * i + 3) % 259 for i in range(20))
SHARED = [
    TokenizedSample(LONG, (140, 2, 77, 30)),
    TokenizedSample(LONG, (9,), 0.5),
    TokenizedSample((*LONG[:-1], 55), (8, 3), 2.0, (0.5, 3.0)),
]
ONE_TOKEN = [TokenizedSample((12,), (140, 2, 77)), TokenizedSample((13,), (1,))]
OTHERS = [
    TokenizedSample((3, 50, 7, 99, 12), (5, 6, 7, 8, 9, 10, 11)),
    TokenizedSample((200, 201), (202, 203)),
    # As long as the models go: padding to its right must not count on.
    TokenizedSample(tuple(range(100, 163)), (60,)),
]
ALL = [*SHARED, *ONE_TOKEN, *OTHERS]
MIXING = {
    "qwen3": Mixing.PADDED,
    "gpt2": Mixing.PADDED,
    "opt": Mixing.PADDED,
    "mistral": Mixing.PADDED,
    "gemma2": Mixing.PADDED,
    "gemma3": Mixing.PADDED,
    "qwen3_moe": Mixing.PADDED,
    "mixtral": Mixing.PADDED,
    "bloom": Mixing.SAME_LENGTH,
    "qwen3_next": Mixing.ONE,
}


def in_batches(
    model: Any, samples: list[TokenizedSample], budget: int, mixing: Mixing
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Each sample's loss sum, and the gradient of all samples."""
    contexts, sums = FrozenContexts(model), [0.0] * len(samples)
    model.zero_grad()
    for batch in plan_batches(samples, budget, mixing):
        weighted, of_samples = batch_loss(model, batch, contexts)
        torch.autograd.backward([weighted / 10])
        for index, loss_sum in zip(batch.indices, of_samples[0].tolist(), strict=True):
            sums[index] = loss_sum
    return sums, gradients(model)


def one_by_one(
    model: Any, samples: list[TokenizedSample]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model.zero_grad()
    sums = []
    for sample in samples:
        loss = continuation_loss(model, sample)
        torch.autograd.backward([loss.weighted / 10])
        sums.append(loss.loss_sum)
    return sums, gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", MIXING)
def test_what_a_family_may_mix_is_found_by_trying(make_model: Make, family: str) -> None:
    assert mixing_of(make_model(family)) is MIXING[family]


@pytest.mark.parametrize("budget", [1000, 8], ids=["one forward", "small forwards"])
@pytest.mark.parametrize("family", MIXING)
def test_a_batch_is_its_samples_one_by_one(make_model: Make, family: str, budget: int) -> None:
    model = make_model(family)
    sums, together = in_batches(model, ALL, budget, mixing_of(model))
    expected, alone = one_by_one(model, ALL)
    assert sums == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        largest = float(gradient.abs().max())
        difference = float((together[name] - gradient).abs().max())
        assert difference <= 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "gpt2"])
def test_another_sample_changes_nothing_in_its_neighbours(make_model: Make, family: str) -> None:
    model = make_model(family)
    changed = [*OTHERS[:2], TokenizedSample(tuple(range(50, 113)), (1,))]
    (one,), (other,) = (plan_batches(s, 1000, Mixing.PADDED) for s in (OTHERS, changed))
    with torch.no_grad():
        first = batch_logits(model, one, FrozenContexts(model))
        second = batch_logits(model, other, FrozenContexts(model))
    for row, sample in enumerate(one.samples[:2]):
        real = slice(len(sample.continuation_ids))
        torch.testing.assert_close(first[row, real], second[row, real], rtol=0, atol=1e-5)
    assert (first[2] - second[2]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "qwen3_next"])
def test_a_continuation_leaves_the_shared_context_as_it_was(make_model: Make, family: str) -> None:
    model, mixing = make_model(family), mixing_of(make_model(family))
    contexts = FrozenContexts(model)
    first, *others = plan_batches([SHARED[0]] * 3, 4, mixing)
    assert first.keeps_contexts
    before = batch_logits(model, first, contexts).detach()
    kept = copy.deepcopy(contexts._caches)
    after = batch_logits(model, others[0], contexts).detach()
    assert torch.equal(before, after)
    assert_same_states(kept, contexts._caches)
    assert torch.equal(before, batch_logits(model, others[1], contexts).detach())
    assert not contexts._caches, "freed after its last use"


def assert_same_states(one: Any, other: Any) -> None:
    """Keys and values, or the states of linear attention."""
    layers = [(one[name].layers, other[name].layers) for name in one]
    for old, new in (pair for both in layers for pair in zip(*both, strict=True)):
        if hasattr(old, "recurrent_states"):
            assert torch.equal(old.recurrent_states[0], new.recurrent_states[0])
            assert torch.equal(old.conv_states[0], new.conv_states[0])
        else:
            assert torch.equal(old.keys, new.keys) and torch.equal(old.values, new.values)


def test_a_context_runs_once_a_step_however_many_samples_continue_it(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("qwen3")
    forward, widths = model.forward, []

    def count(ids: torch.Tensor, **options: Any) -> Any:
        widths.append(tuple(ids.shape))
        return forward(ids, **options)

    monkeypatch.setattr(model, "forward", count)
    in_batches(model, [TokenizedSample(LONG, (i, i + 1)) for i in range(10)], 8, Mixing.PADDED)
    assert widths == [(1, 19), (4, 2), (4, 2), (2, 2)]


SAMPLE = st.builds(
    lambda context, n: TokenizedSample((*context, 1), (2,) * n),
    st.sampled_from([(), (3,), (4,), (3, 4, 5), (6,) * 12, (7,) * 40]),
    st.integers(1, 12),
)


def test_on_a_cpu_short_samples_are_not_padded_to_long_ones() -> None:
    short = [TokenizedSample((n,), (2,) * 4) for n in range(20)]
    samples = [TokenizedSample((3,), (2,) * 40), *short, TokenizedSample((4,), (2,) * 6)]

    def shapes(device: str) -> list[tuple[int, int]]:
        planned = plan_batches(samples, 10**6, Mixing.PADDED, device)
        return [(len(batch.samples), batch.learned_width) for batch in planned]

    # What is little wider stays: a pass of its own costs more.
    assert shapes("cpu") == [(21, 6), (1, 40)]
    assert shapes("cuda") == [(22, 40)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(SAMPLE, min_size=1, max_size=30),
    st.integers(1, 40) | st.just(1000),
    st.sampled_from(Mixing),
)
def test_a_plan_holds_every_sample_once_within_its_budget(
    samples: list[TokenizedSample], budget: int, mixing: Mixing
) -> None:
    batches = plan_batches(samples, budget, mixing, "cpu")
    assert sorted(i for b in batches for i in b.indices) == list(range(len(samples)))
    for batch in batches:
        assert batch.samples == tuple(samples[i] for i in batch.indices)
        rows = zip(batch.samples, batch.context_rows, strict=True)
        assert all(frozen_context(sample) == batch.contexts[row] for sample, row in rows)
        if len(batch.samples) > 1:
            assert mixing is not Mixing.ONE
            assert batch.learned_tokens <= budget
            most = budget * CONTEXT_TOKENS_PER_LEARNED
            assert len(batch.samples) * batch.context_width <= most
        widths = {len(context) for context in batch.contexts}
        assert len(widths) == 1 or (mixing is Mixing.PADDED and 0 not in widths)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(SAMPLE, min_size=1, max_size=30), st.integers(1, 40), st.sampled_from(Mixing))
def test_a_plan_runs_each_context_once(
    samples: list[TokenizedSample], budget: int, mixing: Mixing
) -> None:
    batches, held, ran = plan_batches(samples, budget, mixing, "cpu"), (), []
    for batch in batches:
        if batch.contexts != held:
            ran += batch.contexts
        held = batch.contexts if batch.keeps_contexts else ()
    with_context = [context for context in ran if context]
    assert sorted(with_context) == sorted({frozen_context(s) for s in samples} - {()})


class Counted(TokenizedSample):
    """Counts how often a plan looks at its samples."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        Counted.looks += name.endswith("_ids")
        return super().__getattribute__(name)


@pytest.mark.parametrize("mixing", Mixing)
@pytest.mark.parametrize("contexts", [1, 512])
def test_a_plan_looks_at_each_sample_a_fixed_number_of_times(mixing: Mixing, contexts: int) -> None:
    samples = [Counted((n % contexts, n % contexts // 8, 1), (2, 3)) for n in range(512)]
    Counted.looks = 0
    plan_batches(samples, 10**6, mixing)
    assert Counted.looks <= 8 * len(samples)

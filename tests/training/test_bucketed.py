"""Micro-batches in buckets: what they say is what they say as they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_trainer.training.apart import NotApart
from apollo_trainer.training.attention import use_grouped_attention
from apollo_trainer.training.batch import MicroBatch, Mixing, plan_batches
from apollo_trainer.training.bucketed import Bucket, Inputs, losses
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.objectives import DEFAULT_CLIP, Clip
from apollo_trainer.training.samples import TokenizedSample
from tests.training.plain_attention import attended

Make = Callable[[str], Any]
CASES = {
    "one": [TokenizedSample((3, 50, 7, 99), (140, 2, 77))],
    "without a context": [TokenizedSample((3,), (140, 2, 77)), TokenizedSample((4,), (9, 8))],
    "unlike": [
        TokenizedSample((3, 50, 7, 99), (140, 2, 77)),
        TokenizedSample((11, 12), (13, 14), 0.5, (1.0, 3.0)),
    ],
    "one context": [
        TokenizedSample((3, 50, 7), (60, 61), 2.0),
        TokenizedSample((3, 50, 8), (62, 63, 64)),
        TokenizedSample((5, 6, 9, 9), (65,)),
    ],
}


# Of a window, a chunk: 6 tokens.
WINDOWED = ["mistral", "gemma2", "gemma2_capped", "gemma3", "qwen2", "gpt_oss", "llama4"]


EQUAL = {
    "one": CASES["one"],
    "without a context": [TokenizedSample((3,), (140, 2, 77)), TokenizedSample((4,), (9, 8))],
    "one context, equally long": [
        TokenizedSample((3, 50, 7), (60, 61), 2.0),
        TokenizedSample((3, 50, 8), (62, 63, 64)),
    ],
}


def drawn(*lengths: tuple[int, int]) -> list[TokenizedSample]:
    """Samples of so many context and continuation tokens."""
    draw = random.Random(7)
    return [
        TokenizedSample(*(tuple(draw.choices(range(1, 259), k=size)) for size in pair))
        for pair in lengths
    ]


CASES |= {
    "longer than a window": drawn((21, 5)),
    "a continuation longer than a window": drawn((4, 19)),
    "no context, longer than a window": drawn((1, 19), (1, 3)),
    "shorter and longer than a window": drawn((4, 3), (24, 9), (10, 2), (7, 12)),
}


def gradients(model: Any, weighted: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.autograd.backward([weighted])
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(
    model: Any,
    batch: MicroBatch,
    inputs: Inputs,
    divisor: float,
    *,
    apart: bool = False,
    clip: Clip = DEFAULT_CLIP,
) -> None:
    """What a bucket says is what its micro-batch says."""
    inputs.fill(batch, divisor)
    weighted, sums = losses(model, inputs, apart=apart)
    expected = batch_loss(model, batch, FrozenContexts(model), divisor, clip)
    torch.testing.assert_close(sums, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted, expected[0], rtol=1e-5, atol=1e-6)
    got, wanted = gradients(model, weighted), gradients(model, expected[0])
    assert got.keys() == wanted.keys()
    norms = {name: float(torch.linalg.vector_norm(value)) for name, value in wanted.items()}
    # Queries that see one key learn nothing: what is left of them is rounding of the others.
    noise = 1e-6 * max(1.0, *norms.values())
    for name, norm in norms.items():
        off = float(torch.linalg.vector_norm(got[name] - wanted[name]))
        assert off <= 1e-4 * norm + noise, name


@pytest.mark.parametrize("way", ["own", "grouped", "apart"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "qwen3_moe", *WINDOWED])
def test_losses_and_gradients_are_those_of_the_micro_batch(
    make_model: Make, family: str, case: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products stand for the kernel that attends to contexts apart; it has tests of its own."""
    monkeypatch.setattr("apollo_trainer.training.attention.attend", attended)
    model = make_model(family)
    assert way == "own" or use_grouped_attention(model)
    (batch,) = plan_batches(CASES[case], 1000, Mixing.PADDED)
    inputs = Inputs(Bucket.of(batch), model.device)
    for divisor in (3.0, 5.0):
        if way == "apart" and family == "llama4" and bucket_is_wider(inputs):
            with pytest.raises(NotApart, match="more than a window"):
                check(model, batch, inputs, divisor, apart=True)
        else:
            check(model, batch, inputs, divisor, apart=way == "apart")


@pytest.mark.parametrize("case", EQUAL)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_next", "mamba2"])
def test_what_padding_changes_is_taken_in_its_own_widths(
    make_model: Make, family: str, case: str
) -> None:
    samples = EQUAL[case] if family == "qwen3" else EQUAL[case][:1]
    (batch,) = plan_batches(samples, 1000, Mixing.SAME_LENGTH)
    bucket = Bucket.of(batch, "none")
    assert (bucket.context_width, bucket.learned_width) == (
        batch.context_width,
        batch.learned_width,
    )
    model = make_model(family)
    check(model, batch, Inputs(bucket, model.device), 3.0)


@pytest.mark.parametrize("lengths", [(21, 5), (1, 3), (4, 19), (16, 16), (17, 1)])
def test_what_keeps_states_is_padded_on_its_left(
    make_model: Make, lengths: tuple[int, int]
) -> None:
    model, (sample,) = make_model("qwen3_next"), drawn(lengths)
    (batch,) = plan_batches([sample], 1000, Mixing.ONE)
    check(model, batch, Inputs(Bucket.of(batch, "left"), model.device), 3.0)


def bucket_is_wider(inputs: Inputs) -> bool:
    """Than a chunk."""
    return inputs.bucket.context_width + inputs.bucket.learned_width > 6


@pytest.fixture(scope="module")
def windowed(make_model: Make) -> dict[str, Any]:
    models = {family: make_model(family) for family in WINDOWED}
    assert all(map(use_grouped_attention, models.values()))
    return models


@settings(max_examples=60)
@given(
    st.sampled_from(WINDOWED),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=4),
)
def test_windows_count_no_padding(
    windowed: dict[str, Any], family: str, lengths: list[tuple[int, int]]
) -> None:
    for batch in plan_batches(drawn(*lengths), 1000, Mixing.PADDED):
        model = windowed[family]
        check(model, batch, Inputs(Bucket.of(batch), model.device), 1.0)


def test_what_was_in_the_inputs_before_is_gone(make_model: Make) -> None:
    model = make_model("qwen3")
    batches = [plan_batches([each], 1000, Mixing.PADDED)[0] for each in CASES["unlike"]]
    assert Bucket.of(batches[0]) == Bucket.of(batches[1])
    inputs = Inputs(Bucket.of(batches[0]), model.device)
    for batch in (*batches, batches[0]):
        inputs.fill(batch, 1.0)
        _, expected = batch_loss(model, batch, FrozenContexts(model))
        torch.testing.assert_close(losses(model, inputs)[1], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_bucket_is_little_wider_than_what_is_in_it(context: int, learned: int) -> None:
    sample = TokenizedSample((1,) * (context + 1), (2,) * learned)
    bucket = Bucket.of(plan_batches([sample], 10**6, Mixing.PADDED)[0])
    for width, true in ((bucket.context_width, context), (bucket.learned_width, learned)):
        assert true <= width <= max(true + 15, true * 17 / 16)

"""Both sides must agree on seeded tokens; a map that is wrong anywhere shows as nats."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedConfig

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights.verify import (
    FLOOR_NATS,
    NOISE_FACTOR,
    PROBE_TOKENS,
    QUANTILES,
    log_probabilities,
    noise_of,
    probe_tokens,
    require_agreement,
)
from examples.byte_model import write_model

DTYPES = pytest.mark.parametrize("dtype", sorted(QUANTILES, key=str))
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TOKENS = 40


class Sized:
    """What a probe asks of a model: the size of its vocabulary and its window of attention."""

    def __init__(self, vocabulary, window=None, composite=False):
        self.weight = torch.empty(vocabulary, 1)
        text = PreTrainedConfig(sliding_window=window)
        self.config = PreTrainedConfig(text_config=text) if composite else text

    def get_input_embeddings(self):
        return self


def noise(nats, count=TOKENS):
    """Rounding that moves every score by as much."""
    return lambda: torch.full((count,), nats)


def refusal(ours, engine, dtype=torch.float32, rounding=None):
    with pytest.raises(FailedPrecondition) as error:
        require_agreement(ours, engine, dtype, rounding or noise(0.0, len(ours)))
    return error.value.reason


def scores(apart, tokens=TOKENS, count=TOKENS):
    """Ours, and an engine's that is so far apart at so many tokens."""
    ours = -torch.linspace(1, 4, count)
    return ours, [float(x) + (apart if i < tokens else 0.0) for i, x in enumerate(ours)]


@DTYPES
@pytest.mark.parametrize("sign", [1, -1])
def test_what_rounding_explains_is_accepted_and_the_largest_difference_returned(dtype, sign):
    rounding, apart = noise(0.2), sign * 0.9 * 0.2 * NOISE_FACTOR[dtype]
    assert math.isclose(
        require_agreement(*scores(apart), dtype, rounding), abs(apart), rel_tol=1e-3
    )
    assert refusal(*scores(1.2 * apart), dtype, rounding) == "LOGPROBS_DISAGREE"


@DTYPES
def test_a_difference_that_no_one_needs_to_explain_is_accepted_unmeasured(dtype):
    def unasked():
        raise AssertionError("a forward pass too many")

    assert require_agreement(*scores(0.9 * FLOOR_NATS), dtype, unasked) > 0
    assert refusal(*scores(2 * FLOOR_NATS), dtype) == "LOGPROBS_DISAGREE"


@HALVES
def test_in_16_bits_a_token_that_fell_to_the_other_side_of_a_tie_is_accepted(dtype):
    assert require_agreement(*scores(0.5, tokens=3), dtype, noise(1e-3)) == pytest.approx(0.5)
    assert refusal(*scores(0.5, tokens=8), dtype, noise(1e-3)) == "LOGPROBS_DISAGREE"


def test_in_float32_a_single_token_is_refused():
    assert refusal(*scores(0.01, tokens=1), torch.float32) == "LOGPROBS_DISAGREE"


def test_a_model_that_rounds_to_a_third_of_a_nat_is_accepted_where_a_quiet_one_is_not():
    found = scores(0.3)
    assert require_agreement(*found, torch.bfloat16, noise(0.15)) == pytest.approx(0.3, abs=1e-5)
    assert refusal(*found, torch.bfloat16, noise(0.01)) == "LOGPROBS_DISAGREE"


def test_the_noise_is_that_of_the_weights_as_they_are_when_it_is_asked(tmp_path, config, live):
    model = live(write_model(tmp_path, config(), seed=4)).model.to(torch.bfloat16)
    tokens = probe_tokens(Sized(259), 64)
    ours = log_probabilities(model, tokens)
    measured = noise_of(model, tokens, ours)()
    expected = (ours - log_probabilities(model.float(), tokens)).abs()
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-5)
    assert measured.max() > 1e-3


def test_a_model_whose_noise_cannot_be_measured_has_a_bound_all_the_same(caplog):
    class Odd(torch.nn.Linear):
        device = torch.device("cpu")

        def forward(self, ids, use_cache):
            raise NotImplementedError("no such kernel for float")

    odd = Odd(2, 2, dtype=torch.bfloat16)
    rounding = noise_of(odd, [1, 2], torch.zeros(1))
    assert float(rounding()) * NOISE_FACTOR[torch.bfloat16] == pytest.approx(0.25)
    assert "no such kernel" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["ours", "engine"])
def test_a_value_that_is_no_number_is_refused(value, side):
    ours, engine = torch.tensor([-1.0, -2.0]), [-1.0, -2.0]
    if side == "ours":
        ours[1] = value
    else:
        engine[1] = value
    assert refusal(ours, engine) == "LOGPROBS_DISAGREE"


def test_not_a_number_on_both_sides_is_refused():
    assert refusal(torch.tensor([math.nan]), [math.nan]) == "LOGPROBS_DISAGREE"


@pytest.mark.parametrize("engine", [[], [-1.0], [-1.0] * 4])
def test_another_number_of_scores_is_refused(engine):
    assert refusal(torch.full((3,), -1.0), engine) == "LOGPROBS_DISAGREE"


@pytest.mark.parametrize("length", [3, 17, 49, 4096])
def test_probe_tokens_fit_the_model_and_are_the_same_each_time(length):
    tokens = probe_tokens(Sized(259), length)
    assert tokens == probe_tokens(Sized(259), length)
    assert len(tokens) == min(PROBE_TOKENS, length - 1)
    assert all(0 <= token < 259 for token in tokens)
    assert len(set(tokens)) > len(tokens) // 2


@pytest.mark.parametrize(
    ("window", "length", "count"), [(64, 256, 80), (64, 70, 69), (4096, 8192, 48), (None, 256, 48)]
)
@pytest.mark.parametrize("composite", [False, True])
def test_a_probe_reaches_past_a_short_sliding_window(window, length, count, composite):
    assert len(probe_tokens(Sized(259, window, composite), length)) == count


@pytest.mark.parametrize("length", [20, 120])
def test_log_probabilities_are_those_of_the_next_token(tmp_path, config, live, length):
    model = live(write_model(tmp_path, config(), seed=4)).model
    tokens = probe_tokens(Sized(259, window=100), length)
    found = log_probabilities(model, tokens)
    assert found.shape == (len(tokens) - 1,)
    for end in (1, 5, len(tokens) // 2, len(tokens) - 1):
        last = model(torch.tensor([tokens[:end]]), use_cache=False).logits[0, -1]
        expected = torch.log_softmax(last.detach().double(), -1)[tokens[end]]
        torch.testing.assert_close(found[end - 1].double(), expected, rtol=0, atol=1e-5)


def test_agreeing_models_pass_and_keep_no_graph(tmp_path, config, live):
    found = live(write_model(tmp_path, config(), seed=4))
    tokens = probe_tokens(Sized(259), 64)
    ours = log_probabilities(found.model, tokens)
    engine = log_probabilities(found.original, tokens).tolist()
    assert not ours.requires_grad
    assert require_agreement(ours, engine, torch.float32, noise(0.0)) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_parameter_at_a_wrong_place_is_refused(tmp_path, config, live, wrong):
    found = live(write_model(tmp_path, config(), seed=4))
    tokens = probe_tokens(Sized(259), 64)
    engine = log_probabilities(found.original, tokens).tolist()
    view = found.views[wrong]
    view.copy_(view.roll(1, dims=0))
    assert refusal(log_probabilities(found.model, tokens), engine) == "LOGPROBS_DISAGREE"

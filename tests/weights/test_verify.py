"""Both sides must agree on seeded tokens; a map that is wrong anywhere shows as nats."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedConfig

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights.verify import (
    PROBE_TOKENS,
    TOLERANCE_NATS,
    log_probabilities,
    probe_tokens,
    require_agreement,
)
from examples.byte_model import write_model

DTYPES = pytest.mark.parametrize("dtype", sorted(TOLERANCE_NATS, key=str))


class Sized:
    """What a probe asks of a model: the size of its vocabulary and its window of attention."""

    def __init__(self, vocabulary, window=None, composite=False):
        self.weight = torch.empty(vocabulary, 1)
        text = PreTrainedConfig(sliding_window=window)
        self.config = PreTrainedConfig(text_config=text) if composite else text

    def get_input_embeddings(self):
        return self


def refusal(ours, engine, dtype=torch.float32):
    with pytest.raises(FailedPrecondition) as error:
        require_agreement(ours, engine, dtype)
    return error.value.reason


@DTYPES
def test_a_difference_within_the_tolerance_of_the_dtype_is_returned(dtype):
    ours = torch.tensor([-1.0, -2.0, -3.0])
    within = 0.5 * TOLERANCE_NATS[dtype]
    found = require_agreement(ours, [-1.0, -2.0 - within, -3.0], dtype)
    assert math.isclose(found, within, rel_tol=1e-3)


@DTYPES
@pytest.mark.parametrize("sign", [1, -1])
def test_a_single_token_beyond_the_tolerance_is_refused(dtype, sign):
    beyond = sign * 2 * TOLERANCE_NATS[dtype]
    ours = torch.tensor([-1.0, -2.0, -3.0])
    assert refusal(ours, [-1.0, -2.0, -3.0 + beyond], dtype) == "LOGPROBS_DISAGREE"


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
    assert require_agreement(ours, engine, torch.float32) < 1e-5


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

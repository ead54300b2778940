"""A tiny real transformers model that learns with Apollo on a CPU, and what it is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from apollo_trainer.checkpoints.snapshots.model_state import ModelState, to_host
from apollo_trainer.checkpoints.snapshots.write_watch import WriteWatch
from apollo_trainer.optim import Apollo
from apollo_trainer.weights.checkpoint_reader import same_bytes

CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


class Learner:
    """The same seed makes the same learner, and the same number the same batch."""

    def __init__(self, rounding: Any = "stochastic", seed: int = 3, device: str = "cpu"):
        torch.manual_seed(seed)
        self.model: Any = AutoModelForCausalLM.from_config(Qwen3Config(**CONFIG)).bfloat16().eval()
        self.model.to(device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = Apollo(self.parameters.items(), lr=1e-3, rank=8, rounding=rounding, seed=7)
        self.watch = WriteWatch()
        self.optimizer.before_param_write = self.watch

    def backward(self, number: int) -> float:
        torch.manual_seed(1000 + number)
        tokens = torch.randint(0, 64, (2, 12)).to(self.model.device)
        self.optimizer.zero_grad()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return float(loss.detach())

    def train(self, first: int, count: int, around: Callable[[], object] | None = None) -> list:
        """Losses of batches `first`, ...; `around` is called between forward-backward and step."""
        losses = []
        for number in range(first, first + count):
            losses.append(self.backward(number))
            if around:
                around()
            self.optimizer.step()
        return losses

    def fail_halfway(self, number: int) -> None:
        """A step that writes some parameters and then raises."""
        self.backward(number)
        for parameter in list(self.parameters.values())[5:]:
            parameter.grad = None
        failing = patch.object(self.optimizer, "_end", side_effect=InterruptedError)
        with failing, pytest.raises(InterruptedError):
            self.optimizer.step()

    def state(self) -> ModelState:
        return capture(self.parameters, self.optimizer)

    def assert_is(self, wanted: ModelState) -> None:
        assert_same(self.state(), wanted)


def capture(parameters: Mapping[str, torch.Tensor], optimizer: Apollo) -> ModelState:
    """A copy of all, between two steps."""
    moments, description = optimizer.named_state()
    return ModelState(
        {name: to_host(p) for name, p in parameters.items()},
        {name: to_host(t) for name, t in moments.items()},
        copy.deepcopy(description),
    )


def assert_same(a: ModelState, b: ModelState) -> None:
    """Bits of weights and moments, and every number of the description."""
    for mine, other in ((a.parameters, b.parameters), (a.moments, b.moments)):
        assert mine.keys() == other.keys()
        for name in mine:
            assert same_bytes(mine[name], other[name]), name
    assert a.description == b.description


def copied(state: ModelState) -> ModelState:
    return copy.deepcopy(state)

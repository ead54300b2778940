"""Options of a run: read from the request, checked by field, put on the live optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.options import read_options
from apollo_trainer.training.options import OptimizerOptions, StateShape

FLOATS = ("lr", "beta1", "beta2", "eps", "weight_decay", "scale", "norm_growth_limit")


def fields_refused(**fields: Any) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        read_options(pb.OptimizerConfig(**fields))
    assert caught.value.reason == "OPTION_INVALID"
    return [violation.field for violation in caught.value.violations]


def test_unset_fields_are_the_defaults_of_the_contract() -> None:
    assert read_options(pb.OptimizerConfig()) == OptimizerOptions(
        lr=1e-5,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        warmup_steps=0,
        scale=None,
        proj_refresh=200,
        norm_growth_limit=1.01,
        rank=None,
        variant=None,
        rounding=None,
        reset=False,
    )
    assert StateShape() == StateShape(rank=64, variant="channel", rounding="stochastic")


def test_every_set_field_arrives() -> None:
    config = pb.OptimizerConfig(
        lr=0.5,
        rank=3,
        beta1=0.25,
        beta2=0.75,
        eps=0.125,
        weight_decay=0.0,
        warmup_steps=7,
        scale=2.0,
        proj_refresh=11,
        norm_growth_limit=4.0,
        variant=pb.OPTIMIZER_VARIANT_MINI,
        rounding=pb.ROUNDING_NEAREST,
        reset_optimizer=True,
    )
    assert read_options(config) == OptimizerOptions(
        0.5, (0.25, 0.75), 0.125, 0.0, 7, 2.0, 11, 4.0, 3, "mini", "nearest", True
    )


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("lr", [-1e-9], [0.0, 1.0]),
        ("rank", [0, -1], [1]),
        ("beta1", [-0.1, 1.0, 2.0], [0.0, 0.999]),
        ("beta2", [-0.1, 1.0], [0.0, 0.999]),
        ("eps", [0.0, -1.0], [1e-30]),
        ("weight_decay", [-0.1], [0.0]),
        ("warmup_steps", [-1], [0, 5]),
        ("scale", [0.0, -1.0], [0.1]),
        ("proj_refresh", [0, -1], [1]),
        ("norm_growth_limit", [0.5, -1.0], [0.0, 1.0]),
    ],
)
def test_each_rule_refuses_at_its_field_and_takes_its_edge(
    name: str, wrong: list[Any], right: list[Any]
) -> None:
    for value in wrong:
        assert fields_refused(**{name: value}) == [f"spec.optimizer.{name}"]
    for value in right:
        read_options(pb.OptimizerConfig(**{name: value}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_no_number_that_is_not_finite_is_taken(name: str, value: float) -> None:
    assert fields_refused(**{name: value}) == [f"spec.optimizer.{name}"]


@pytest.mark.parametrize("name", ["variant", "rounding"])
def test_a_choice_of_a_later_version_is_refused(name: str) -> None:
    assert fields_refused(**{name: 99}) == [f"spec.optimizer.{name}"]


def test_all_wrong_fields_are_named_at_once() -> None:
    assert fields_refused(lr=-1, eps=0, rank=0) == [
        "spec.optimizer.lr",
        "spec.optimizer.rank",
        "spec.optimizer.eps",
    ]

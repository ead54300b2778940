"""Options of a run: read from the request, checked by field, put on the live optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.optim import Apollo
from apollo_trainer.training.options import OptimizerOptions, StateShape, read_options

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


def two_groups() -> Apollo:
    torch.manual_seed(0)
    groups = [{"params": [(n, torch.nn.Parameter(torch.randn(8, 8)))]} for n in ("a", "b")]
    return Apollo(groups, rank=4)


def test_apply_sets_every_group_and_warm_up_counts_from_now() -> None:
    optimizer = two_groups()
    optimizer.step_count = 5
    OptimizerOptions(0.5, (0.25, 0.75), 0.125, 0.0, 7, 2.0, 11, 4.0).apply(optimizer)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.25, 0.75), 0.125)
        assert (group["weight_decay"], group["scale"], group["proj_refresh"]) == (0.0, 2.0, 11)
        assert (group["warmup_steps"], group["warmup_from"]) == (7, 5)
        assert group["norm_growth_limit"] == 4.0
        assert group["rank"] == 4


def test_options_of_one_run_do_not_leak_into_the_next() -> None:
    optimizer = two_groups()
    OptimizerOptions(lr=0.5, scale=2.0, norm_growth_limit=0.0).apply(optimizer)
    assert all(group["norm_growth_limit"] is None for group in optimizer.param_groups)
    read_options(pb.OptimizerConfig()).apply(optimizer)
    for group in optimizer.param_groups:
        assert (group["lr"], group["scale"], group["norm_growth_limit"]) == (1e-5, None, 1.01)


@pytest.mark.parametrize(
    "asked",
    [
        {"rank": 8},
        {"variant": pb.OPTIMIZER_VARIANT_MINI},
        {"rounding": pb.ROUNDING_SPLIT16},
    ],
)
def test_another_state_shape_is_refused_unless_reset(asked: dict[str, Any]) -> None:
    live = StateShape()
    with pytest.raises(FailedPrecondition, match="reset_optimizer") as caught:
        read_options(pb.OptimizerConfig(**asked)).shape_on(live)
    assert caught.value.reason == "OPTIMIZER_MISMATCH"
    reset = read_options(pb.OptimizerConfig(**asked, reset_optimizer=True))
    assert reset.shape_on(live) != live


def test_leaving_split16_is_refused_too() -> None:
    asked = read_options(pb.OptimizerConfig(rounding=pb.ROUNDING_NEAREST))
    with pytest.raises(FailedPrecondition):
        asked.shape_on(StateShape(rounding="split16"))


def test_what_keeps_the_state_needs_no_reset() -> None:
    live = StateShape(rank=8, variant="mini")
    assert read_options(pb.OptimizerConfig()).shape_on(live) == live
    same = pb.OptimizerConfig(rank=8, variant=pb.OPTIMIZER_VARIANT_MINI)
    assert read_options(same).shape_on(live) == live
    nearest = read_options(pb.OptimizerConfig(rounding=pb.ROUNDING_NEAREST)).shape_on(live)
    assert nearest == StateShape(8, "mini", "nearest")

"""Options of a run: read from the request, checked by field, put on the live optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.optim import Apollo
from apollo_trainer.requests.options import read_options
from apollo_trainer.training.options import OptimizerOptions, StateShape


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

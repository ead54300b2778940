"""Limits of a request: read, or refused at their field."""

from __future__ import annotations

import math

import pytest

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.guard import MIN_LOSS, read_guard
from apollo_trainer.training.guard import Guard


def test_limits_are_read_and_wrong_ones_refused_at_their_field() -> None:
    assert read_guard(pb.Guard()) == Guard(min_loss=MIN_LOSS)
    given = pb.Guard(max_loss=2, max_grad_norm=3, max_update_ratio=0.5, min_loss=0)
    assert read_guard(given) == Guard(2, 3, 0.5, 0)
    for name in ("max_loss", "max_grad_norm", "max_update_ratio"):
        for value in (0, -1, math.nan, math.inf):
            with pytest.raises(InvalidArgument) as caught:
                read_guard(pb.Guard(**{name: value}))
            assert [v.field for v in caught.value.violations] == [f"spec.guard.{name}"]
            assert caught.value.reason == "GUARD_INVALID"


def test_a_smallest_loss_of_0_turns_it_off_and_one_below_is_refused() -> None:
    assert read_guard(pb.Guard(min_loss=0.5)) == Guard(min_loss=0.5)
    for value in (-1, math.nan, math.inf):
        with pytest.raises(InvalidArgument) as caught:
            read_guard(pb.Guard(min_loss=value))
        assert [v.field for v in caught.value.violations] == ["spec.guard.min_loss"]

"""What a request asks to be computed: each wrong field is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.losses import (
    AnchorOptions,
    Filter,
    Loss,
    read_anchor_options,
    read_filter,
    read_loss,
)
from apollo_trainer.training.objectives import Clip


def policy(**fields: float) -> pb.RunSpec:
    return pb.RunSpec(policy_gradient=pb.PolicyGradient(**fields))


def distillation(top_k: int = 0) -> pb.RunSpec:
    return pb.RunSpec(context_distillation=pb.ContextDistillation(top_k=top_k))


@pytest.mark.parametrize(
    ("spec", "loss"),
    [
        (pb.RunSpec(), Loss("cross_entropy")),
        (pb.RunSpec(cross_entropy=pb.CrossEntropy()), Loss("cross_entropy")),
        (distillation(), Loss("context_distillation", 20)),
        (distillation(5), Loss("context_distillation", 5)),
        (policy(), Loss("policy_gradient", clip=Clip(0.2, 0.2))),
        (policy(clip_low=0, clip_high=0.3), Loss("policy_gradient", clip=Clip(0.0, 0.3))),
    ],
)
def test_a_loss_is_read_with_its_defaults(spec: pb.RunSpec, loss: Loss) -> None:
    assert read_loss(spec) == loss


def test_anchors_and_filters_are_read_with_their_defaults() -> None:
    assert read_anchor_options(pb.Anchors()) == AnchorOptions(True, 1.0, 2, False)
    replay = pb.Anchors(
        loss=pb.ANCHOR_LOSS_REPLAY, weight=0.5, samples_per_step=8, regression_set=True
    )
    assert read_anchor_options(replay) == AnchorOptions(False, 0.5, 8, True)
    chosen = pb.ParameterFilter(include=["*.mlp.*"], exclude=["*.bias"], layers=[0, 3])
    assert read_filter(chosen) == Filter(("*.mlp.*",), ("*.bias",), (0, 3))


@pytest.mark.parametrize(
    ("field", "read"),
    [
        ("spec.context_distillation.top_k", lambda: read_loss(distillation(-1))),
        ("spec.context_distillation.top_k", lambda: read_loss(distillation(2000))),
        ("spec.policy_gradient.clip_low", lambda: read_loss(policy(clip_low=1))),
        ("spec.policy_gradient.clip_low", lambda: read_loss(policy(clip_low=math.nan))),
        ("spec.policy_gradient.clip_high", lambda: read_loss(policy(clip_high=-0.1))),
        ("spec.policy_gradient.clip_high", lambda: read_loss(policy(clip_high=math.inf))),
        ("spec.anchors.weight", lambda: read_anchor_options(pb.Anchors(weight=0))),
        ("spec.anchors.weight", lambda: read_anchor_options(pb.Anchors(weight=math.nan))),
        (
            "spec.anchors.samples_per_step",
            lambda: read_anchor_options(pb.Anchors(samples_per_step=-1)),
        ),
        ("spec.anchors.loss", lambda: read_anchor_options(pb.Anchors(loss=9))),  # type: ignore[arg-type]
        ("spec.parameters.layers[1]", lambda: read_filter(pb.ParameterFilter(layers=[0, -1]))),
    ],
)
def test_a_wrong_field_is_named(field: str, read: Callable[[], Any]) -> None:
    with pytest.raises(InvalidArgument) as error:
        read()
    assert [violation.field for violation in error.value.violations] == [field]

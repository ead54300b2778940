"""What a request asks to be computed of its samples, and which parameters are to learn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.training.filter import chosen
from apollo_trainer.training.objectives import Clip

Kind = Literal["cross_entropy", "context_distillation", "policy_gradient"]
TOP_K = 20
MAX_TOP_K = 1024
MAX_ANCHOR_WEIGHT = 1e6
MAX_ANCHORS_PER_STEP = 1024
MAX_SELF_MADE = 1024
SUBJECTS, TEXTS = 256, 32


@dataclass(frozen=True)
class Loss:
    """The loss of a run's samples.

    Attributes:
        top_k: tokens of the teacher that are compared one by one.
        clip: of a policy gradient.
    """

    kind: Kind = "cross_entropy"
    top_k: int = TOP_K
    clip: Clip = field(default_factory=Clip)


@dataclass(frozen=True)
class AnchorOptions:
    """How a run's anchors are used.

    Attributes:
        keeps_distribution: KL to the run's start; else they are learned as samples are.
        regression_set: whether that of the model is taken as well.
        subjects: that the model is to find itself.
        texts: that it is to write itself.
    """

    keeps_distribution: bool = True
    weight: float = 1.0
    per_step: int = 2
    regression_set: bool = False
    subjects: int = 0
    texts: int = 0


@dataclass(frozen=True)
class Filter:
    """Which parameters learn, as `ParameterFilter` says."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def names(self, model: nn.Module) -> frozenset[str]:
        """Those of a model's parameters. Raises FailedPrecondition where there is none."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        found = chosen(names, self.include, self.exclude, self.layers)
        if not found:
            raise FailedPrecondition(
                "No parameter of the served model is one of spec.parameters; nothing was trained. "
                f"Names are such as {names[0]}.",
                reason="NO_PARAMETERS",
            )
        return found


def read_loss(spec: pb.RunSpec) -> Loss:
    """The loss of a request. Raises InvalidArgument with the path of a wrong field."""
    kind = spec.WhichOneof("loss") or "cross_entropy"
    if kind == "context_distillation":
        k = spec.context_distillation.top_k
        if not 0 <= k <= MAX_TOP_K:
            raise InvalidArgument.at(
                f"spec.{kind}.top_k", f"is {k}; it must be from 0 (the default) to {MAX_TOP_K}"
            )
        return Loss(kind, k or TOP_K)
    if kind == "policy_gradient":
        return Loss(kind, clip=_read_clip(spec.policy_gradient))
    return Loss()


def _read_clip(policy: pb.PolicyGradient) -> Clip:
    defaults = Clip()
    low = policy.clip_low if policy.HasField("clip_low") else defaults.low
    high = policy.clip_high if policy.HasField("clip_high") else defaults.high
    if not 0 <= low < 1:
        says = f"is {low:g}; it must be at least 0 (no limit) and below 1"
        raise InvalidArgument.at("spec.policy_gradient.clip_low", says)
    if not (math.isfinite(high) and high >= 0):
        says = f"is {high:g}; it must be finite, and 0 (no limit) or above"
        raise InvalidArgument.at("spec.policy_gradient.clip_high", says)
    return Clip(low, high)


def read_anchor_options(anchors: pb.Anchors) -> AnchorOptions:
    """How anchors are used. Raises InvalidArgument with the path of a wrong field."""
    weight = anchors.weight if anchors.HasField("weight") else 1.0
    if not 0 < weight <= MAX_ANCHOR_WEIGHT:
        says = f"is {weight:g}; it must be above 0 and at most {MAX_ANCHOR_WEIGHT:g}"
        raise InvalidArgument.at("spec.anchors.weight", says)
    per_step = anchors.samples_per_step
    if not 0 <= per_step <= MAX_ANCHORS_PER_STEP:
        says = f"is {per_step}; it must be from 0 (the default) to {MAX_ANCHORS_PER_STEP}"
        raise InvalidArgument.at("spec.anchors.samples_per_step", says)
    if anchors.loss not in pb.AnchorLoss.values():
        raise InvalidArgument.at(
            "spec.anchors.loss", f"is {anchors.loss}, which this version does not know"
        )
    keeps = anchors.loss != pb.ANCHOR_LOSS_REPLAY
    made = _read_self_made(anchors)
    return AnchorOptions(keeps, weight, per_step or 2, anchors.regression_set, *made)


def _read_self_made(anchors: pb.Anchors) -> tuple[int, int]:
    """How many subjects and texts."""
    asked = anchors.self_made
    for name, count in (("subjects", asked.subjects), ("texts", asked.texts)):
        if not 0 <= count <= MAX_SELF_MADE:
            says = f"is {count}; it must be from 0 (the default) to {MAX_SELF_MADE}"
            raise InvalidArgument.at(
                f"spec.anchors.self_made.{name}", says, reason="OPTION_INVALID"
            )
    if not anchors.HasField("self_made"):
        return 0, 0
    return asked.subjects or SUBJECTS, asked.texts or TEXTS


def read_filter(parameters: pb.ParameterFilter) -> Filter:
    """Which parameters learn. Raises InvalidArgument with the path of a wrong field."""
    for index, layer in enumerate(parameters.layers):
        if layer < 0:
            raise InvalidArgument.at(
                f"spec.parameters.layers[{index}]", f"is {layer}; layers count from 0"
            )
    return Filter(tuple(parameters.include), tuple(parameters.exclude), tuple(parameters.layers))

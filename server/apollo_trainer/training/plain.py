"""What a step is given, as JSON has it, so that other ranks are told of it; nothing is pickled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.named_state import describe_group
from apollo_trainer.training.guard import Guard
from apollo_trainer.training.objectives import Clip
from apollo_trainer.training.samples import TokenizedSample, TopTokens
from apollo_trainer.training.step_policy import StepPolicy


def of_samples(samples: Iterable[TokenizedSample]) -> list[dict[str, Any]]:
    """Samples, those of a teacher with what it said."""
    return [_of_sample(sample) for sample in samples]


def _of_sample(sample: TokenizedSample) -> dict[str, Any]:
    top = sample.targets
    told = None if top is None else {"ids": top.ids.tolist(), "log_probs": top.log_probs.tolist()}
    return asdict(replace(sample, targets=None)) | {"targets": told}


def to_samples(plain: Iterable[dict[str, Any]]) -> list[TokenizedSample]:
    """The samples of `of_samples`."""
    return [_to_sample(dict(each)) for each in plain]


def _to_sample(plain: dict[str, Any]) -> TokenizedSample:
    top = plain.pop("targets")
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
    }
    if top is not None:
        ids = torch.tensor(top["ids"], dtype=torch.int32)
        fields["targets"] = TopTokens(ids, torch.tensor(top["log_probs"]))
    return TokenizedSample(**fields)


def of_policy(policy: StepPolicy) -> dict[str, Any]:
    """A policy."""
    return asdict(policy)


def to_policy(plain: dict[str, Any]) -> StepPolicy:
    """The policy of `of_policy`."""
    made = {"guard": Guard(**plain["guard"]), "clip": Clip(**plain["clip"])}
    return StepPolicy(**(plain | made))


def of_settings(optimizer: Apollo) -> dict[str, Any]:
    """What an optimizer's next step depends on beside its state."""
    groups = [describe_group(group) for group in optimizer.param_groups]
    for group in groups:
        group.pop("param_names", None)
    return {"groups": groups, "step_count": optimizer.step_count, "rounding": optimizer.rounding}


def apply_settings(optimizer: Apollo, plain: dict[str, Any]) -> None:
    """Makes an optimizer's next step depend on the same."""
    for group, values in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update(values, betas=tuple(values["betas"]))
    optimizer.step_count, optimizer.rounding = plain["step_count"], plain["rounding"]

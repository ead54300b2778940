"""One optimizer step: losses, gradients, the guard, and only then a write to the live weights."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.optim import Apollo
from apollo_trainer.optim.options import settings_for
from apollo_trainer.training.loss import continuation_loss
from apollo_trainer.training.samples import TokenizedSample


@dataclass(frozen=True)
class StepResult:
    """What one step did; losses in nats, times in seconds, norms over all parameters."""

    loss: float
    loss_sum: float
    tokens: int
    grad_norm: float
    update_norm: float
    learning_rate: float
    changed_fraction: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    optimizer_step: int


class UpdateRefused(FailedPrecondition):
    """The guard refused an update; the weights and the optimizer are as before the step."""


def take_step(model: Any, optimizer: Apollo, samples: Sequence[TokenizedSample]) -> StepResult:
    """Learns the samples with one update, in place.

    The loss is the mean over all continuation tokens of the step, by their weights.

    Raises UpdateRefused, with nothing written, for a loss or gradient that is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum, tokens, forward, backward = _accumulate(model, samples)
    grad_norm = _gradient_norm(model, loss_sum)
    learning_rate = _learning_rate(optimizer)
    began = time.perf_counter()
    optimizer.step()
    optimizer_seconds = time.perf_counter() - began
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss_sum / tokens,
        loss_sum=loss_sum,
        tokens=tokens,
        grad_norm=grad_norm,
        update_norm=_measured(optimizer.last_update_norm),
        learning_rate=learning_rate,
        changed_fraction=_measured(optimizer.last_changed_fraction),
        forward_seconds=forward,
        backward_seconds=backward,
        optimizer_seconds=optimizer_seconds,
        optimizer_step=optimizer.step_count,
    )


def _learning_rate(optimizer: Apollo) -> float:
    """What the next step takes, after warm-up; the same for all groups here."""
    number = optimizer.step_count + 1
    group = optimizer.param_groups[0]
    return settings_for(group, number, optimizer.variant, optimizer.compat).lr


def _accumulate(model: Any, samples: Sequence[TokenizedSample]) -> tuple[float, int, float, float]:
    """Gradients of all samples summed; returns loss sum, tokens, forward and backward seconds."""
    total_weight = sum(
        s.weight * (math.fsum(s.token_weights) if s.token_weights else len(s.continuation_ids))
        for s in samples
    )
    loss_sum, tokens, forward, backward = 0.0, 0, 0.0, 0.0
    for sample in samples:
        loss = continuation_loss(model, sample)
        began = time.perf_counter()
        torch.autograd.backward([loss.weighted / total_weight])
        backward += time.perf_counter() - began
        forward += loss.seconds
        loss_sum, tokens = loss_sum + loss.loss_sum, tokens + loss.tokens
    return loss_sum, tokens, forward, backward


def _gradient_norm(model: Any, loss_sum: float) -> float:
    """Norm of the whole gradient, not clipped; refuses what is not finite before any write."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack([_norm(g) for g in gradients])))
    if not math.isfinite(loss_sum) or not math.isfinite(norm):
        what = "loss" if not math.isfinite(loss_sum) else "gradient"
        for parameter in model.parameters():
            parameter.grad = None
        raise UpdateRefused(
            f"The {what} is not finite; this update was not written, the earlier ones of the run "
            "were. Look at the sample, or lower the learning rate.",
            reason=f"NONFINITE_{what.upper()}",
        )
    return norm


def _measured(value: torch.Tensor | None) -> float:
    return 0.0 if value is None else float(value)


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm

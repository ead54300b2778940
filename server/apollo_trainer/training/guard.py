"""Limits that refuse an update before it is written, and the loss that ends a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.training.samples import TokenizedSample


class UpdateRefused(FailedPrecondition):
    """The guard refused an update; the weights and the optimizer are as before the step."""


class LossReached(Exception):
    """A step's loss is below the guard's `min_loss`; nothing of the step was written."""


@dataclass(frozen=True)
class Guard:
    """Limits of a run; None is none. A loss or gradient that is not finite is always refused.

    Attributes:
        max_loss: of a step's mean loss a token, in nats.
        max_grad_norm: of the norm of the whole gradient.
        max_update_ratio: of the norm of what a step would add to the weights, as stored, over
            the norm of the weights that have a gradient.
        min_loss: a step whose mean loss a token, in nats, is below is not written; 0 is none. It
            does not count for a policy gradient, whose loss may be negative.
    """

    max_loss: float | None = None
    max_grad_norm: float | None = None
    max_update_ratio: float | None = None
    min_loss: float = 0.0

    def for_step_of(self, samples: Iterable[TokenizedSample]) -> Guard:
        """The guard of a step that learns these."""
        policy = any(sample.has_policy_loss for sample in samples)
        return replace(self, min_loss=0.0) if policy else self

    def check_loss(self, loss: float) -> None:
        """Raises LossReached, or UpdateRefused with NONFINITE_LOSS or GUARD_MAX_LOSS."""
        if not math.isfinite(loss):
            raise _not_finite("loss")
        if self.min_loss > 0 and loss < self.min_loss:
            raise LossReached
        _check("max_loss", "mean loss", loss, self.max_loss)

    def check_gradient(self, norm: float) -> None:
        """Raises UpdateRefused with NONFINITE_GRADIENT or GUARD_MAX_GRAD_NORM."""
        if not math.isfinite(norm):
            raise _not_finite("gradient")
        _check("max_grad_norm", "gradient's norm", norm, self.max_grad_norm)

    def check_update(self, update_norm: float, weight_norm: float) -> None:
        """Raises UpdateRefused with GUARD_MAX_UPDATE_RATIO."""
        if self.max_update_ratio is None or update_norm == 0:
            return
        ratio = update_norm / weight_norm if weight_norm else math.inf
        _check("max_update_ratio", "update's norm over that of the weights", ratio,
               self.max_update_ratio)  # fmt: skip


NO_LIMITS = Guard()


class Unlearned:
    """The samples of a run whose latest loss was not below the guard's `min_loss`.

    The run ends at a step whose loss is below, once no other samples are left here.
    """

    def __init__(self, samples: Iterable[TokenizedSample], guard: Guard):
        self._samples, self._guard = set(samples), guard

    def guard_of(self, samples: Iterable[TokenizedSample]) -> Guard:
        """The guard of a step of these: its `min_loss` counts once no others are left."""
        return self._guard if self._samples.issubset(samples) else self._without

    @property
    def _without(self) -> Guard:
        return replace(self._guard, min_loss=0.0)

    def took(self, samples: Iterable[TokenizedSample], loss: float) -> None:
        """A step of these was written, from this loss on."""
        if loss < self._guard.min_loss:
            self._samples.difference_update(samples)
        else:
            self._samples.update(samples)


def _check(name: str, what: str, measured: float, limit: float | None) -> None:
    if limit is None or measured <= limit:
        return
    raise UpdateRefused(
        f"The {what} is {measured:.6g}; the guard's {name} is {limit:g}. This update was not "
        "written, the earlier ones of the run were. Look at the sample, lower the learning rate, "
        "or raise the limit.",
        reason=f"GUARD_{name.upper()}",
        metadata={"guard": name, "measured": repr(measured), "limit": repr(limit)},
    )


def _not_finite(what: str) -> UpdateRefused:
    return UpdateRefused(
        f"The {what} is not finite; this update was not written, the earlier ones of the run "
        "were. Look at the sample, or lower the learning rate.",
        reason=f"NONFINITE_{what.upper()}",
    )

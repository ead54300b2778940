"""What a step tells of its losses, from the sums over each sample's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apollo_trainer.training.batch import MicroBatch
from apollo_trainer.training.samples import TokenizedSample


@dataclass(frozen=True)
class PolicyFigures:
    """Means over the tokens of a policy gradient.

    Attributes:
        mean_ratio: of a token's probability now over that when it was sampled.
        kl: of what a log-probability fell by since then, in nats; an estimate of
            KL(sampler || now).
        clipped_fraction: part of the tokens whose ratio was cut, and that gave no gradient.
    """

    mean_ratio: float
    kl: float
    clipped_fraction: float


@dataclass(frozen=True)
class LossFigures:
    """The part of a step's result that its losses make; see `StepResult`."""

    loss: float
    loss_sum: float
    tokens: int
    sample_losses: tuple[float, ...]
    anchor_loss: float | None
    anchor_losses: tuple[float, ...]
    policy: PolicyFigures | None


class Sums:
    """What the micro-batches of a step told, on the device until the step's one wait.

    Args:
        learned: the first samples of the step.
        anchors: those after them.
    """

    def __init__(self, learned: Sequence[TokenizedSample], anchors: Sequence[TokenizedSample]):
        self._learned, self._anchors = learned, anchors
        self._taken: list[tuple[MicroBatch, Tensor]] = []

    def add(self, batch: MicroBatch, sums: Tensor) -> None:
        """Takes what `weighed` tells of a micro-batch."""
        self._taken.append((batch, sums))

    def on_device(self) -> Tensor:
        """All of them, float64 [n]."""
        return torch.cat([sums.flatten() for _, sums in self._taken]).double()

    def figures(self, numbers: Sequence[float]) -> LossFigures:
        """The figures, of what `on_device` gave."""
        rows, rest = dict[int, tuple[float, ...]](), iter(numbers)
        for batch, sums in self._taken:
            columns = [[next(rest) for _ in batch.indices] for _ in range(len(sums))]
            rows.update(zip(batch.indices, zip(*columns, strict=True), strict=True))
        learned = [rows[index] for index in range(len(self._learned))]
        anchors = [rows[len(learned) + index] for index in range(len(self._anchors))]
        loss_sum, tokens = sum(row[0] for row in learned), _tokens(self._learned)
        return LossFigures(
            loss_sum / tokens,
            loss_sum,
            tokens,
            _means(self._learned, learned),
            sum(row[0] for row in anchors) / _tokens(self._anchors) if anchors else None,
            _means(self._anchors, anchors),
            _policy(self._learned, learned),
        )


def _policy(
    samples: Sequence[TokenizedSample], rows: Sequence[tuple[float, ...]]
) -> PolicyFigures | None:
    mine = [(s, r) for s, r in zip(samples, rows, strict=True) if s.has_policy_loss]
    if not mine:
        return None
    tokens = _tokens([sample for sample, _ in mine])
    return PolicyFigures(*(sum(row[n] for _, row in mine) / tokens for n in (1, 2, 3)))


def _means(
    samples: Sequence[TokenizedSample], rows: Sequence[tuple[float, ...]]
) -> tuple[float, ...]:
    return tuple(row[0] / s.learned_tokens for s, row in zip(samples, rows, strict=True))


def _tokens(samples: Sequence[TokenizedSample]) -> int:
    return sum(sample.learned_tokens for sample in samples)

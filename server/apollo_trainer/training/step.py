"""One optimizer step: losses, gradients, the guard, and only then a write to the live weights.

Its phases are those of every step: forward and backward passes that leave gradients, one verdict
over loss and gradient, for which the host waits once, and the write. Nothing is written before the
verdict, and nothing is allocated for it after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.factored import Gradient, scaled
from apollo_trainer.optim.gradients import summed_gradients
from apollo_trainer.optim.options import settings_for
from apollo_trainer.optim.preview import Preview
from apollo_trainer.training.batch import MicroBatch, Mixing, plan_batches
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.figures import PolicyFigures, Sums
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.gradients import StepGradients, backward
from apollo_trainer.training.guard import LossReached, UpdateRefused
from apollo_trainer.training.incomplete import telling_incomplete
from apollo_trainer.training.loss import as_anchors, batch_loss, total_weight
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.out_of_memory import OutOfMemory, refusing_out_of_memory
from apollo_trainer.training.plain import of_policy, of_samples, of_settings
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step_policy import DEFAULT_POLICY, StepPolicy

log = logging.getLogger(__name__)
_MANY = 0.1  # part of the weights whose whole gradients are worth a word
FullGradients = Literal["", "LONG_STEP"]


@dataclass(frozen=True)
class StepResult:
    """What one step did, or in a dry run would do; losses in nats, times in seconds.

    Attributes:
        loss: mean over the continuation tokens that are learned, before any weight; anchors count
            neither here nor in `loss_sum` and `tokens`.
        grad_norm: of the whole gradient, not clipped.
        update_norm: of the stored change of all weights.
        optimizer_step: steps since the optimizer's state began.
        micro_batches: forward passes with gradient.
        full_gradients: why gradients as large as their parameters were made; empty where all
            those of matrices were factors.
        skipped_tensors: parameters that were not stepped, because what was computed from their
            gradient was not finite, though its norm was.
        sample_losses: mean over the tokens of each learned sample, before any weight, in order.
        anchor_loss: mean over the tokens of all anchors, before any weight; None without any.
        anchor_losses: mean over the tokens of each, in order.
        policy: of the learned samples with a policy loss; None without any.
    """

    loss: float
    loss_sum: float
    tokens: int
    grad_norm: float
    learning_rate: float
    forward_seconds: float
    backward_seconds: float
    optimizer_step: int
    micro_batches: int
    update_norm: float = 0.0
    changed_fraction: float = 0.0
    optimizer_seconds: float = 0.0
    full_gradients: FullGradients = ""
    skipped_tensors: int = 0
    sample_losses: tuple[float, ...] = ()
    anchor_loss: float | None = None
    anchor_losses: tuple[float, ...] = ()
    policy: PolicyFigures | None = None


def take_step(
    model: Any,
    optimizer: Apollo,
    samples: Sequence[TokenizedSample],
    policy: StepPolicy = DEFAULT_POLICY,
    before_batch: Callable[[], None] = lambda: None,
    passes: CapturedPasses | None = None,
    anchors: Sequence[TokenizedSample] = (),
    anchor_weight: float = 1.0,
) -> StepResult:
    """Learns the samples with one update, in place.

    The loss is the mean over all continuation tokens of the samples, by their weights, and
    `anchor_weight` times that of the anchors.

    Args:
        before_batch: called before each micro-batch; what it raises ends the step unwritten.
        passes: those of this model that are captured; on a GPU alone.

    Raises UpdateRefused where the guard refuses, OutOfMemory, or what `before_batch` raised, and
    StepIncomplete. After StepIncomplete part of the step is in the weights; after any other error
    the weights and the optimizer are as before the step.
    """
    given = anchors
    anchors = as_anchors(samples, anchors, anchor_weight)

    def told() -> dict[str, Any]:
        return {
            "samples": of_samples(samples), "policy": of_policy(policy),
            "anchors": of_samples(given), "anchor_weight": anchor_weight,
            "settings": of_settings(optimizer),
        }  # fmt: skip

    with optimizer.ranks.telling("step", told, (UpdateRefused, LossReached)):
        return _take(model, optimizer, samples, anchors, policy, before_batch, passes)


def _take(
    model: Any,
    optimizer: Apollo,
    samples: Sequence[TokenizedSample],
    anchors: Sequence[TokenizedSample],
    policy: StepPolicy,
    before_batch: Callable[[], None],
    passes: CapturedPasses | None,
) -> StepResult:
    while True:
        step = None
        try:
            step = _Step(model, optimizer, samples, anchors, policy, before_batch, passes)
            return step.take()
        except OutOfMemory:
            if passes is not None and passes.let_go():
                # Graphs of other steps held what this one needs.
                passes = None
                continue
            # Another rank may have had memory, and be further.
            half = _half(step.batches) if step and optimizer.ranks.size == 1 else 0
            if not half:
                raise
            log.warning("no memory for micro-batches of %d tokens: half are tried", 2 * half)
            policy, passes = replace(policy, token_budget=half), None


def _half(batches: Sequence[MicroBatch]) -> int:
    """Half the tokens of the largest micro-batch that can be divided; 0 where none can."""
    return max((b.learned_tokens for b in batches if len(b.samples) > 1), default=0) // 2


@dataclass
class _Step:
    """One try at a step; with less memory the next try has smaller micro-batches."""

    model: Any
    optimizer: Apollo
    samples: Sequence[TokenizedSample]
    anchors: Sequence[TokenizedSample]
    policy: StepPolicy
    before_batch: Callable[[], None]
    passes: CapturedPasses | None = None
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0

    def __post_init__(self) -> None:
        if most := self.policy.open_tokens:
            self.samples = [sample.opened(most) for sample in self.samples]
            self.anchors = [anchor.opened(most) for anchor in self.anchors]
        together = (*self.samples, *self.anchors)
        mixing = mixing_of(self.model) if len(together) > 1 else Mixing.ONE
        device = self.model.device.type
        self.batches = plan_batches(together, self.policy.token_budget, mixing, device)
        self.sums = Sums(self.samples, self.anchors)
        self.contexts = FrozenContexts(self.model)
        self.weight = sum(total_weight(sample) for sample in self.samples)
        self.collected = StepGradients(self.optimizer.tensors, len(self.batches))

    def take(self) -> StepResult:
        """Takes the step; however it ends, no gradient of it is kept."""
        self.optimizer.zero_grad()
        try:
            with refusing_out_of_memory(self.batches, self.policy.token_budget):
                return self._take()
        finally:
            self.optimizer.zero_grad()
            self.optimizer.forget()

    def _take(self) -> StepResult:
        """Everything that may refuse, and then the write."""
        self._pass()
        gradients = summed_gradients(self.optimizer, self.collected.settle())
        norm, preview = self.optimizer.prepare(gradients), self._preview(gradients)
        judged, limit = self._judge(norm), self.policy.clip_grad_norm
        if limit is not None and judged.grad_norm > limit:
            gradients = _scaled(gradients, limit / judged.grad_norm)
            self.optimizer.prepare(gradients)
            preview = self._preview(gradients)
        if preview is not None:
            self.policy.guard.check_update(preview.update_norm(), preview.weight_norm())
        if self.policy.dry_run:
            return self._previewed(judged, preview)
        skipped = self.optimizer.skipped_nonfinite
        with telling_incomplete(self.optimizer):
            return self._write(gradients, judged, skipped)

    def _pass(self) -> None:
        """Forward and backward over all micro-batches."""
        for batch in self.batches:
            self.optimizer.ranks.agree(self.before_batch)
            began = time.perf_counter()
            of_samples = self._replayed(batch)
            self.forward_seconds += time.perf_counter() - began
            if of_samples is None:
                of_samples = self._run(batch)
            self.sums.add(batch, of_samples)

    def _replayed(self, batch: MicroBatch) -> Tensor | None:
        if self.passes is None:
            return None
        alone, clip = len(self.batches) == 1, self.policy.clip
        return self.passes.take(batch, self.weight, self.collected, alone=alone, clip=clip)

    def _run(self, batch: MicroBatch) -> Tensor:
        with self.collected.collecting():
            began = time.perf_counter()
            how = self.contexts, self.weight, self.policy.clip
            weighted, sums = batch_loss(self.model, batch, *how)
            turned = time.perf_counter()
            backward(weighted)
            self.forward_seconds += turned - began
            self.backward_seconds += time.perf_counter() - turned
        return sums

    def _preview(self, gradients: Mapping[Tensor, Gradient]) -> Preview | None:
        """What the write would do; None where nobody asks, as it costs a copy of a parameter."""
        asked = self.policy.dry_run or self.policy.guard.max_update_ratio is not None
        return Preview(self.optimizer, gradients) if asked else None

    def _judge(self, norm: Tensor) -> StepResult:
        """What the host waits for: whether this may be written, and what is known before it is."""
        guard, sums = self.policy.guard.for_step_of(self.samples), self.sums.on_device()
        *numbers, grad_norm = torch.cat([sums, norm.view(1).to(sums.device)]).tolist()
        figures = self.sums.figures(numbers)
        guard.check_loss(figures.loss)
        guard.check_gradient(grad_norm)
        many = self.collected.held.made > self.optimizer.weights * _MANY
        return StepResult(
            **vars(figures),
            grad_norm=grad_norm,
            learning_rate=self._learning_rate(),
            forward_seconds=self.forward_seconds,
            backward_seconds=self.backward_seconds,
            optimizer_step=self.optimizer.step_count,
            micro_batches=len(self.batches),
            full_gradients="LONG_STEP" if many else "",
        )

    def _learning_rate(self) -> float:
        """What the next step takes, after warm-up; the same for all groups here."""
        optimizer = self.optimizer
        group, number = optimizer.param_groups[0], optimizer.step_count + 1
        return settings_for(group, number, optimizer.variant, optimizer.compat).lr

    def _previewed(self, judged: StepResult, preview: Preview | None) -> StepResult:
        assert preview is not None
        changed = preview.changed() / max(1, self.optimizer.weights)
        return replace(judged, update_norm=preview.update_norm(), changed_fraction=changed)

    def _write(
        self, gradients: Mapping[Tensor, Gradient], judged: StepResult, skipped: int
    ) -> StepResult:
        """Writes the step. `skipped`: gradients that the optimizer had skipped before it."""
        optimizer, began = self.optimizer, time.perf_counter()
        optimizer.step(gradients=gradients)
        seconds = time.perf_counter() - began
        return replace(
            judged,
            update_norm=_measured(optimizer.last_update_norm),
            changed_fraction=_measured(optimizer.last_changed_fraction),
            optimizer_seconds=seconds,
            optimizer_step=optimizer.step_count,
            skipped_tensors=optimizer.skipped_nonfinite - skipped,
        )


def _scaled(gradients: Mapping[Tensor, Gradient], factor: float) -> dict[Tensor, Gradient]:
    return {param: scaled(gradient, factor) for param, gradient in gradients.items()}


def _measured(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value)

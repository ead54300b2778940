"""One optimizer step: losses, gradients, the guard, and only then a write to the live weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from apollo_trainer.optim import Apollo
from apollo_trainer.optim.gradients import has_ties
from apollo_trainer.optim.options import settings_for
from apollo_trainer.training.accumulation import summed_gradients
from apollo_trainer.training.batch import MicroBatch, Mixing, plan_batches
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.guard import NO_LIMITS, Guard
from apollo_trainer.training.inspection import Inspection
from apollo_trainer.training.loss import batch_loss, total_weight
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.out_of_memory import refusing_out_of_memory
from apollo_trainer.training.release import telling_incomplete, trial_backward, write_backward
from apollo_trainer.training.samples import TokenizedSample

TOKEN_BUDGET = 1024
FullGradients = Literal["", "ACCUMULATION", "TIED_PARAMETERS", "REQUESTED"]


@dataclass(frozen=True)
class StepPolicy:
    """How a step is taken.

    Attributes:
        token_budget: continuation tokens of one micro-batch, padding included; of context tokens
            it may hold 16 times as many. A single sample may be larger.
        dry_run: find everything, write nothing.
        release: let go of each gradient as soon as it has been used, where a step allows it.
            False keeps all of them, as large as the model, and saves a backward pass. A step of
            several micro-batches always keeps them, as their sum: in float32, 4 bytes a weight.
    """

    token_budget: int = TOKEN_BUDGET
    guard: Guard = NO_LIMITS
    dry_run: bool = False
    release: bool = True


DEFAULT_POLICY = StepPolicy()


@dataclass(frozen=True)
class StepResult:
    """What one step did, or in a dry run would do; losses in nats, times in seconds.

    Attributes:
        loss: mean over the continuation tokens, before any weight.
        grad_norm: of the whole gradient, not clipped.
        update_norm: of the stored change of all weights.
        optimizer_step: steps since the optimizer's state began.
        micro_batches: forward passes with gradient.
        full_gradients: why all gradients were held at once; empty where they were released one by
            one.
        skipped_tensors: parameters that were not stepped, because their gradient was not finite
            in the second backward pass though it was in the first; 0 wherever a device computes
            the same twice.
    """

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
    micro_batches: int = 1
    full_gradients: FullGradients = ""
    skipped_tensors: int = 0


def take_step(
    model: Any,
    optimizer: Apollo,
    samples: Sequence[TokenizedSample],
    policy: StepPolicy = DEFAULT_POLICY,
    before_batch: Callable[[], None] = lambda: None,
) -> StepResult:
    """Learns the samples with one update, in place.

    The loss is the mean over all continuation tokens of the step, by their weights.

    Args:
        before_batch: called before each micro-batch; what it raises ends the step unwritten.

    Raises UpdateRefused where the guard refuses, OutOfMemory, or what `before_batch` raised, and
    StepIncomplete. After StepIncomplete part of the step is in the weights; after any other error
    the weights and the optimizer are as before the step.
    """
    step = _Step(model, optimizer, samples, policy, before_batch)
    free_gradients(model)
    try:
        with refusing_out_of_memory(step.batches, policy.token_budget):
            return step.take()
    finally:
        free_gradients(model)


def free_gradients(model: Any) -> None:
    """Releases the gradients of all parameters, ties included."""
    for parameter in model.parameters():
        parameter.grad = None


@dataclass
class _Times:
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0


@dataclass
class _Step:
    model: Any
    optimizer: Apollo
    samples: Sequence[TokenizedSample]
    policy: StepPolicy
    before_batch: Callable[[], None]
    times: _Times = field(default_factory=_Times)

    def __post_init__(self) -> None:
        mixing = mixing_of(self.model) if len(self.samples) > 1 else Mixing.ONE
        self.batches = plan_batches(self.samples, self.policy.token_budget, mixing)
        self.contexts = FrozenContexts(self.model)
        self.weight = sum(total_weight(sample) for sample in self.samples)
        self.params: list[Tensor] = [
            param for group in self.optimizer.param_groups for param in group["params"]
        ]
        guard, dry_run = self.policy.guard, self.policy.dry_run
        previews = dry_run or guard.max_update_ratio is not None
        self.inspection = Inspection(self.optimizer, previews=previews)
        self.full = self._full_gradients()

    def _full_gradients(self) -> FullGradients:
        if len(self.batches) > 1:
            return "ACCUMULATION"
        if has_ties(self.optimizer):
            return "TIED_PARAMETERS"
        return "" if self.policy.release else "REQUESTED"

    def take(self) -> StepResult:
        """Everything that may refuse, and then the write."""
        loss_sum = self._keep_gradients() if self.full else 0.0
        graph = None
        if not self.full:
            graph, loss_sum = self._try_gradients()
        self._check_gradients()
        skipped, learning_rate = self.optimizer.skipped_nonfinite, self._learning_rate()
        if self.policy.dry_run:
            return self._result(loss_sum, learning_rate, skipped)
        with telling_incomplete(self.optimizer):
            self._write(graph)
            return self._result(loss_sum, learning_rate, skipped)

    def _keep_gradients(self) -> float:
        """The gradients of all micro-batches summed; returns the sum of the losses."""
        sums = []
        several = len(self.batches) > 1
        with summed_gradients(self.model.parameters()) if several else nullcontext():
            for batch in self.batches:
                weighted, loss_sum = self._forward(batch)
                sums.append(loss_sum)
                began = time.perf_counter()
                torch.autograd.backward([weighted])
                self.times.backward += time.perf_counter() - began
        total = float(torch.stack(sums).sum())
        self.policy.guard.check_loss(total / self.tokens)
        for param in self.params:
            self.inspection.add(param)
        return total

    def _try_gradients(self) -> tuple[Tensor, float]:
        """The one micro-batch's graph, after a look at each of its gradients."""
        weighted, loss_sum = self._forward(self.batches[0])
        total = float(loss_sum)
        self.policy.guard.check_loss(total / self.tokens)
        began = time.perf_counter()
        keep = not self.policy.dry_run
        trial_backward(weighted, self.params, self.inspection.add, keep_graph=keep)
        self.times.backward += time.perf_counter() - began
        return weighted, total

    def _forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The micro-batch's part of the step's loss, and the sum of its losses: float64, 0-dim."""
        self.before_batch()
        loss = batch_loss(self.model, batch, self.contexts, self.weight)
        self.times.forward += loss.seconds
        return loss.weighted, loss.sums.double().sum()

    def _check_gradients(self) -> None:
        guard = self.policy.guard
        guard.check_gradient(self.inspection.grad_norm())
        guard.check_update(self.inspection.update_norm(), self.inspection.weight_norm())

    def _write(self, graph: Tensor | None) -> None:
        began, inside = time.perf_counter(), 0.0
        if graph is not None:
            inside = write_backward(graph, self.params, self.optimizer)
            self.times.backward += time.perf_counter() - began - inside
            self.times.optimizer = inside
            return
        self.optimizer.step()
        self.times.optimizer = time.perf_counter() - began

    @property
    def tokens(self) -> int:
        """Continuation tokens of the step."""
        return sum(len(sample.continuation_ids) for sample in self.samples)

    def _learning_rate(self) -> float:
        """What the next step takes, after warm-up; the same for all groups here."""
        optimizer = self.optimizer
        group, number = optimizer.param_groups[0], optimizer.step_count + 1
        return settings_for(group, number, optimizer.variant, optimizer.compat).lr

    def _update(self) -> tuple[float, float]:
        """Norm of the update and the part of the elements that it changes, done or previewed."""
        optimizer = self.optimizer
        if self.policy.dry_run:
            elements = sum(param.numel() for param in self.params)
            return self.inspection.update_norm(), self.inspection.changed() / max(1, elements)
        return _measured(optimizer.last_update_norm), _measured(optimizer.last_changed_fraction)

    def _result(self, loss_sum: float, learning_rate: float, skipped_before: int) -> StepResult:
        update_norm, changed_fraction = self._update()
        return StepResult(
            loss=loss_sum / self.tokens,
            loss_sum=loss_sum,
            tokens=self.tokens,
            grad_norm=self.inspection.grad_norm(),
            update_norm=update_norm,
            learning_rate=learning_rate,
            changed_fraction=changed_fraction,
            forward_seconds=self.times.forward,
            backward_seconds=self.times.backward,
            optimizer_seconds=self.times.optimizer,
            optimizer_step=self.optimizer.step_count,
            micro_batches=len(self.batches),
            full_gradients=self.full,
            skipped_tensors=self.optimizer.skipped_nonfinite - skipped_before,
        )


def _measured(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value)

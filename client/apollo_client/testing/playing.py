"""One run of a fake server, from `started` to `finished`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence

from apollo_client.testing.asking import Asking
from apollo_client.testing.checks import tokens_of
from apollo_client.testing.memory import KeptRun, Memory
from apollo_client.testing.script import MIN_LOSS
from apollo_grpc.errors import ApolloError, Cancelled, FailedPrecondition
from apollo_grpc.times import duration
from apollo_grpc.v1 import training_pb2 as pb

EPOCH, STATE_BYTES = "fake", 1024
MAX_INDICES = 256


class ServerEnded(Exception):
    """The server was stopped in the middle of a run, or an operation."""


def steps_in(spec: pb.RunSpec, samples: Sequence[pb.Sample]) -> int:
    """How many steps a spec comes to."""
    return -(-len(samples) // (spec.samples_per_step or 1)) * (spec.epochs or 1)


class Playing:
    """Plays one run by the script of the moment at which it begins. On the server's own thread.

    Args:
        ended: set once the server is stopped.
    """

    def __init__(self, memory: Memory, kept: KeptRun, ended: threading.Event):
        self._memory, self._kept, self._ended = memory, kept, ended
        self._script, self._spec = memory.script, kept.run.spec
        self._asking = Asking(memory, kept, self._script)
        self._latest: dict[int, float] = {}
        self._done, self._stopped = 0, pb.Notice()

    def play(self) -> None:
        """Raises ServerEnded, with the run left as it is, where the server is stopped."""
        began = time.monotonic()
        try:
            self._begin()
            for step, (epoch, indices) in enumerate(self._steps(), 1):
                self._require_going(began)
                self._script.require_step(step, self._spec.guard)
                if self._knows_all(step, indices):
                    break
                self._take(step, epoch, indices)
            self._evaluate(after=True)
            self._finish(*self._asking.verdict())
        except Cancelled:
            self._finish(pb.RUN_STATE_CANCELLED)
        except ApolloError as error:
            failure = pb.Notice(reason=error.reason, message=error.message)
            self._finish(pb.RUN_STATE_FAILED, failure)

    def _begin(self) -> None:
        memory = self._memory
        memory.require_version(self._spec)
        started = pb.RunEvent.Started(
            steps_total=self._kept.run.steps_total,
            optimizer_step=memory.optimizer_step,
            weight_version=memory.weight_version,
            engine_epoch=EPOCH,
            dry_run=self._spec.dry_run,
        )
        memory.append(self._kept, started=started)
        self._evaluate(after=False)
        self._asking.ask(self._script.loss(1), after=False)

    def _steps(self) -> Iterator[tuple[int, list[int]]]:
        """Epoch and samples of each step."""
        size = self._spec.samples_per_step or 1
        chance = random.Random(self._spec.seed)
        for epoch in range(self._spec.epochs or 1):
            order = list(range(len(self._kept.samples)))
            if self._spec.HasField("seed"):
                chance.shuffle(order)
            for first in range(0, len(order), size):
                yield epoch, order[first : first + size]

    def _require_going(self, began: float) -> None:
        """Waits as long as a step takes. Raises what is to end the run now."""
        with self._memory.changed:
            self._memory.changed.wait_for(
                lambda: self._kept.cancelled or self._ended.is_set(), self._script.step_seconds
            )
        if self._ended.is_set():
            raise ServerEnded
        if self._kept.cancelled:
            raise Cancelled("The run was cancelled.")
        limit = self._spec.max_wall_time
        if self._spec.HasField("max_wall_time") and (
            time.monotonic() - began >= limit.ToNanoseconds() / 1e9
        ):
            words = f"The run had its max_wall_time; {self._done} steps are in the weights."
            raise FailedPrecondition(words, reason="DEADLINE")

    def _knows_all(self, step: int, indices: Sequence[int]) -> bool:
        """Whether `min_loss` ends the run before this step is written."""
        guard = self._spec.guard
        least = guard.min_loss if guard.HasField("min_loss") else MIN_LOSS
        self._latest |= dict.fromkeys(indices, self._script.loss(step))
        known = len(self._latest) == len(self._kept.samples)
        if self._spec.dry_run or not known or max(self._latest.values()) >= least:
            return False
        words = f"Every sample's loss is below min_loss {least:g}; step {step} was not written."
        self._stopped = pb.Notice(reason="GUARD_MIN_LOSS", message=words)
        return True

    def _take(self, step: int, epoch: int, indices: Sequence[int]) -> None:
        with self._memory.changed:
            optimizer_step = self._memory.optimizer_step + 1
            if not self._spec.dry_run:
                self._memory.update()
                self._done = step
            told = self._told(step, indices)
            told.epoch, told.optimizer_step = epoch, optimizer_step
            self._memory.append(self._kept, step=told)
        every = self._spec.evaluate_every_steps
        if every and step % every == 0 and step < self._kept.run.steps_total:
            losses = [self._script.loss(step + 1)] * len(self._spec.evaluation_samples)
            if losses:
                told_losses = pb.RunEvent.Evaluated(step=step, evaluation_losses=losses)
                self._memory.append(self._kept, evaluated=told_losses)

    def _told(self, step: int, indices: Sequence[int]) -> pb.RunEvent.Step:
        loss, samples = self._script.loss(step), self._kept.samples
        tokens = sum(tokens_of(samples[index]).continuation_tokens for index in indices)
        named = indices if len(indices) <= MAX_INDICES else []
        lr = self._spec.optimizer.lr if self._spec.optimizer.HasField("lr") else 1e-5
        return pb.RunEvent.Step(
            step=step,
            loss=loss,
            loss_sum=loss * tokens,
            tokens=tokens,
            grad_norm=1.0,
            update_norm=1e-3,
            learning_rate=lr,
            changed_fraction=0.1,
            forward_time=duration(self._script.step_seconds),
            micro_batches=1,
            dry_run=self._spec.dry_run,
            sample_indices=named,
            sample_losses=[loss] * len(named),
        )

    def _evaluate(self, *, after: bool) -> None:
        """Tells what the next step's loss would be, of each sample."""
        spec, loss = self._spec, self._script.loss(len(self._steps_told()) + 1)
        count = len(self._kept.samples) if spec.evaluate else 0
        if not count and not spec.evaluation_samples:
            return
        told = pb.RunEvent.Evaluated(
            after_training=after,
            losses=[loss] * count,
            step=self._done,
            evaluation_losses=[loss] * len(spec.evaluation_samples),
        )
        self._memory.append(self._kept, evaluated=told)

    def _steps_told(self) -> list[pb.RunEvent]:
        return [event for event in self._kept.events if event.HasField("step")]

    def _finish(self, state: pb.RunState.ValueType, failure: pb.Notice | None = None) -> None:
        with self._memory.changed:
            if state == pb.RUN_STATE_REJECTED:
                self._memory.take_back(self._done)
                self._done = 0
            if not self._spec.dry_run and self._steps_told():
                saved = pb.RunEvent.StateSaved(optimizer_step=self._memory.optimizer_step)
                saved.size_bytes = STATE_BYTES
                self._memory.append(self._kept, state_saved=saved)
            stopped = self._stopped if self._stopped.reason else None
            told = pb.RunEvent.Finished(
                state=state,
                failure=failure,
                steps_done=self._done,
                weight_version=self._memory.weight_version,
                stopped=stopped if state == pb.RUN_STATE_SUCCEEDED else None,
            )
            self._memory.append(self._kept, finished=told)

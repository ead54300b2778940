"""What a run is once its request was checked: samples as token ids, options, steps."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.guard import read_guard
from apollo_trainer.requests.options import read_options
from apollo_trainer.requests.samples import SampleLimits, Tokenize, each_tokenized
from apollo_trainer.training.guard import NO_LIMITS, Guard
from apollo_trainer.training.options import OptimizerOptions
from apollo_trainer.training.samples import TokenizedSample

MAX_EPOCHS = 100_000
MAX_SAMPLES_PER_STEP = 4096
MAX_WALL_SECONDS = 10 * 365 * 86400


@dataclass(frozen=True)
class PreparedRun:
    """A checked run.

    Attributes:
        samples: none where the run was checked only.
        sample_count: of its spec.
        seed: shuffles each epoch; None keeps the order given.
        max_seconds: the run ends as FAILED after so many; None: no limit.
        coherence: how its writes and vLLM's reads go together.
        dry_run: nothing is written, neither weights nor optimizer state.
        evaluate: the loss of each sample is told before and after.
    """

    samples: tuple[TokenizedSample, ...]
    options: OptimizerOptions
    epochs: int
    samples_per_step: int
    seed: int | None
    sample_count: int
    max_seconds: float | None = None
    guard: Guard = NO_LIMITS
    coherence: pb.Coherence = field(default_factory=pb.Coherence)
    dry_run: bool = False
    evaluate: bool = False

    @property
    def steps_total(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * -(-self.sample_count // self.samples_per_step)

    def batches(self) -> Iterator[tuple[TokenizedSample, ...]]:
        """The samples of each step, in order."""
        for epoch in range(self.epochs):
            order = list(self.samples)
            if self.seed is not None:
                random.Random(f"{self.seed}:{epoch}").shuffle(order)
            for start in range(0, len(order), self.samples_per_step):
                yield tuple(order[start : start + self.samples_per_step])


def prepare_run(
    spec: pb.RunSpec, limits: SampleLimits, tokenize: Tokenize, *, only_check: bool = False
) -> PreparedRun:
    """Checks a spec and tokenizes its samples.

    Args:
        tokenize: asks vLLM, which blocks; not of token ids.
        only_check: one sample after the other, and keep none: token ids take many times the
            memory of the spec.

    Raises InvalidArgument with the path of each wrong field, and what `tokenize` raises.
    """
    options = read_options(spec.optimizer)
    _check_counts(spec)
    guard, coherence = read_guard(spec.guard), _check_coherence(spec.coherence)
    tokenized = each_tokenized(spec.samples, limits, tokenize)
    if only_check:
        deque(tokenized, maxlen=0)
    return PreparedRun(
        samples=tuple(tokenized),
        sample_count=len(spec.samples),
        options=options,
        epochs=spec.epochs or 1,
        samples_per_step=spec.samples_per_step or 1,
        seed=spec.seed if spec.HasField("seed") else None,
        max_seconds=_max_seconds(spec),
        guard=guard,
        coherence=coherence,
        dry_run=spec.dry_run,
        evaluate=spec.evaluate,
    )


def _max_seconds(spec: pb.RunSpec) -> float | None:
    if not spec.HasField("max_wall_time"):
        return None
    limit = spec.max_wall_time
    seconds = limit.seconds + limit.nanos / 1e9
    # Of an unreadable duration (nanos out of range, signs that differ) nothing is computed.
    if not 0 < seconds <= MAX_WALL_SECONDS or not 0 <= limit.nanos < 10**9:
        raise InvalidArgument.at(
            "spec.max_wall_time", f"must be a duration above 0 and up to {MAX_WALL_SECONDS} s"
        )
    return seconds


def _check_counts(spec: pb.RunSpec) -> None:
    violations = [
        FieldViolation(f"spec.{name}", f"is {value}; it must be from 0 (the default) to {most}")
        for name, value, most in (
            ("epochs", spec.epochs, MAX_EPOCHS),
            ("samples_per_step", spec.samples_per_step, MAX_SAMPLES_PER_STEP),
        )
        if not 0 <= value <= most
    ]
    if violations:
        first = violations[0]
        raise InvalidArgument(f"{first.field}: {first.description}", violations=violations)


def _check_coherence(coherence: pb.Coherence) -> pb.Coherence:
    wrong = [
        FieldViolation(f"spec.coherence.{name}", f"is {value}, which this version does not know")
        for name, value, known in (
            ("mode", coherence.mode, pb.CoherenceMode.values()),
            ("cache_policy", coherence.cache_policy, pb.CachePolicy.values()),
        )
        if value not in known
    ]
    if wrong:
        raise InvalidArgument(
            f"{wrong[0].field}: {wrong[0].description}",
            violations=wrong,
            reason="OPTION_INVALID",
        )
    return coherence

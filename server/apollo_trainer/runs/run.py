"""What a run is once its request was checked: samples as token ids, options, steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from apollo_grpc.errors import FieldViolation, InvalidArgument, Unimplemented
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.training.options import OptimizerOptions, read_options
from apollo_trainer.training.samples import SampleLimits, TokenizedSample, tokenize_samples

MAX_EPOCHS = 100_000
MAX_SAMPLES_PER_STEP = 4096
MAX_WALL_SECONDS = 10 * 365 * 86400


@dataclass(frozen=True)
class PreparedRun:
    """A checked run.

    Attributes:
        seed: shuffles each epoch; None keeps the order given.
        max_seconds: the run ends as FAILED after so many; None: no limit.
    """

    samples: tuple[TokenizedSample, ...]
    options: OptimizerOptions
    epochs: int
    samples_per_step: int
    seed: int | None
    max_seconds: float | None = None

    @property
    def steps_total(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * -(-len(self.samples) // self.samples_per_step)

    def batches(self) -> Iterator[tuple[TokenizedSample, ...]]:
        """The samples of each step, in order."""
        for epoch in range(self.epochs):
            order = list(self.samples)
            if self.seed is not None:
                random.Random(f"{self.seed}:{epoch}").shuffle(order)
            for start in range(0, len(order), self.samples_per_step):
                yield tuple(order[start : start + self.samples_per_step])


def prepare_run(spec: pb.RunSpec, limits: SampleLimits, tokenizer: object) -> PreparedRun:
    """Checks a spec and tokenizes its samples.

    Raises InvalidArgument with field paths; Unimplemented for what this version cannot do.
    """
    options = read_options(spec.optimizer)
    _check_counts(spec)
    _refuse_unbuilt(spec)
    return PreparedRun(
        samples=tuple(tokenize_samples(spec.samples, limits, tokenizer)),
        options=options,
        epochs=spec.epochs or 1,
        samples_per_step=spec.samples_per_step or 1,
        seed=spec.seed if spec.HasField("seed") else None,
        max_seconds=_max_seconds(spec),
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


def _refuse_unbuilt(spec: pb.RunSpec) -> None:
    """A field that asks for what is not built is refused: ignoring it would be a lie."""
    asked = {
        "dry_run": spec.dry_run,
        "evaluate": spec.evaluate,
        "guard": bool(spec.guard.ListFields()),
        "coherence.mode": spec.coherence.mode
        not in (pb.COHERENCE_MODE_UNSPECIFIED, pb.COHERENCE_MODE_PAUSE_RUN),
        "coherence.cache_policy": spec.coherence.cache_policy
        not in (pb.CACHE_POLICY_UNSPECIFIED, pb.CACHE_POLICY_RESET_AT_END),
    }
    for field, is_asked in asked.items():
        if is_asked:
            raise Unimplemented(
                f"spec.{field} cannot be set in this version; nothing was done. Leave it unset.",
                metadata={"field": f"spec.{field}"},
            )

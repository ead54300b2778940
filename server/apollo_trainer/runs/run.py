"""A run before it is executed: checked, with samples as token ids, and queued."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import InitVar, dataclass, field

from apollo_grpc import traces
from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.datasets import DatasetStore
from apollo_trainer.ledger import EventLog
from apollo_trainer.requests.guard import read_guard
from apollo_trainer.requests.labels import check_labels
from apollo_trainer.requests.losses import (
    AnchorOptions,
    Filter,
    Kind,
    Loss,
    read_anchor_options,
    read_filter,
    read_loss,
)
from apollo_trainer.requests.options import read_options
from apollo_trainer.requests.probes import Question, read_accept_if, read_probes
from apollo_trainer.requests.samples import (
    ANCHORING,
    DISTILLED,
    EVALUATED,
    JUDGED,
    LEARNED,
    SampleLimits,
    Tokenize,
    Use,
    each_tokenized,
)
from apollo_trainer.runs.anchor_turns import AnchorTurns
from apollo_trainer.runs.learned_samples import learned_samples
from apollo_trainer.training.guard import NO_LIMITS, Guard
from apollo_trainer.training.options import OptimizerOptions
from apollo_trainer.training.samples import TokenCounts, TokenizedSample

MAX_EPOCHS = 100_000
MAX_SAMPLES_PER_STEP = 4096
MAX_OPEN_TOKENS = 4096
MAX_WALL_SECONDS = 10 * 365 * 86400
_USES: dict[Kind, Use] = {
    "cross_entropy": LEARNED,
    "context_distillation": DISTILLED,
    "policy_gradient": JUDGED,
}


@dataclass(frozen=True)
class Batch:
    """The samples of one step.

    Attributes:
        epoch: from 0.
        indices: of the samples, in the spec.
    """

    epoch: int
    indices: tuple[int, ...]
    samples: tuple[TokenizedSample, ...]
    anchors: tuple[TokenizedSample, ...] = ()


@dataclass(frozen=True)
class PreparedRun:
    """A checked run.

    Attributes:
        samples: none where the run was checked only.
        sample_count: of its spec.
        seed: shuffles each epoch; None keeps the order given.
        max_seconds: the run fails after so many; None for no limit.
        coherence: how its writes and vLLM's reads go together.
        dry_run: whether neither weights nor optimizer state are written.
        evaluate: whether the loss of each sample is told before and after.
        anchors: what must stay; without those of the regression set until the run begins.
        accept_if: what it must reach to be kept; None where it is kept in any case.
        evaluated: samples whose loss is told, and that are not learned.
        evaluate_every: steps between two of these; 0 for the first and the last alone.
        context_gradient_tokens: last ones of each context that gradients flow through too.
        kinds: of the samples: tokens, text or chat.
        anchor_sources: how many of the anchors each source gave, in order; of one source if empty.
        tokens: of the samples, also where the run was checked only.
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
    loss: Loss = field(default_factory=Loss)
    anchors: tuple[TokenizedSample, ...] = ()
    anchor_options: AnchorOptions = field(default_factory=AnchorOptions)
    probes: tuple[Question, ...] = ()
    accept_if: pb.AcceptIf | None = None
    evaluated: tuple[TokenizedSample, ...] = ()
    evaluate_every: int = 0
    learning: Filter = field(default_factory=Filter)
    context_gradient_tokens: int = 0
    kinds: tuple[str, ...] = ()
    anchor_sources: tuple[int, ...] = ()
    tokens: TokenCounts = field(default_factory=TokenCounts)

    @property
    def steps_total(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * -(-self.sample_count // self.samples_per_step)

    def by_kind(self) -> list[list[TokenizedSample]]:
        """The samples that were given as tokens, as texts and as chats; kinds without any are not
        in it."""
        kinds: dict[str, list[TokenizedSample]] = {}
        for kind, sample in zip(self.kinds, self.samples, strict=True):
            kinds.setdefault(kind, []).append(sample)
        return list(kinds.values())

    def anchor_turns(self) -> AnchorTurns:
        """Which anchors each step has; how far a learned one has moved is not known."""
        options = self.anchor_options
        return AnchorTurns(
            self.anchors, self.anchor_sources, options.per_step, again=options.keeps_distribution
        )

    def batches(self, anchors: AnchorTurns) -> Iterator[Batch]:
        """Yields the samples of each step, in order, each with its turn of the anchors."""
        for epoch in range(self.epochs):
            order = list(range(len(self.samples)))
            if self.seed is not None:
                random.Random(f"{self.seed}:{epoch}").shuffle(order)
            for start in range(0, len(order), self.samples_per_step):
                indices = tuple(order[start : start + self.samples_per_step])
                samples = tuple(self.samples[index] for index in indices)
                yield Batch(epoch, indices, samples, anchors.next())


@dataclass(eq=False)
class QueuedRun:
    """A run from its acceptance to its end; its samples are read from the ledger in its turn.

    Attributes:
        digest: of its spec.
        durable: holds its id, once it is on disk.
        brought_back: by a restart; such a run waits for an engine, others fail without one.
        waits: whether it has not had its turn.
        span: until it ends, within its caller's; none knows of one that was brought back.
        size_bytes: of its spec.
    """

    log: EventLog
    request_id: str
    digest: bytes
    spec: InitVar[pb.RunSpec]
    durable: Future[str]
    brought_back: bool = False
    waits: bool = True
    cancelled: threading.Event = field(default_factory=threading.Event)
    span: traces.Span = field(default_factory=lambda: traces.begin("run"))

    def __post_init__(self, spec: pb.RunSpec) -> None:
        self.options = read_options(spec.optimizer)
        self.size_bytes, self.dry_run = spec.ByteSize(), spec.dry_run

    def fail(self, reason: str, message: str) -> None:
        """Ends it before it began."""
        failure = pb.Notice(reason=reason, message=message)
        self.log.append(finished=pb.RunEvent.Finished(state=pb.RUN_STATE_FAILED, failure=failure))


def prepare_run(
    spec: pb.RunSpec,
    limits: SampleLimits,
    tokenize: Tokenize,
    datasets: DatasetStore | None = None,
    *,
    only_check: bool = False,
) -> PreparedRun:
    """Checks a spec and tokenizes its samples.

    Args:
        tokenize: asks vLLM, and blocks; not called for token ids.
        datasets: where a spec's `dataset_id` is looked up.
        only_check: keeps no sample: token ids take many times the memory of the spec.

    Raises InvalidArgument with the path of each wrong field, and what `tokenize` and
    `learned_samples` raise.
    """
    options = read_options(spec.optimizer)
    _check_counts(spec)
    check_labels(spec)
    guard, coherence = read_guard(spec.guard), _check_coherence(spec.coherence)
    loss, anchor_options = read_loss(spec), read_anchor_options(spec.anchors)
    learning = read_filter(spec.parameters)
    accept_if = read_accept_if(spec.accept_if) if spec.HasField("accept_if") else None

    tokens = TokenCounts()
    samples, use = learned_samples(spec, _USES[loss.kind], datasets)

    def tokenized(samples: Collection[pb.Sample], use: Use) -> tuple[TokenizedSample, ...]:
        found = each_tokenized(samples, limits, tokenize, use)
        found = tokens.counting(found) if use.required else found
        return tuple(deque(found, maxlen=0) if only_check else found)

    return PreparedRun(
        samples=tokenized(samples, use),
        anchors=tokenized(spec.anchors.samples, ANCHORING),
        evaluated=tokenized(spec.evaluation_samples, EVALUATED),
        probes=read_probes(spec.probes, limits, tokenize),
        loss=loss,
        anchor_options=anchor_options,
        accept_if=accept_if,
        evaluate_every=spec.evaluate_every_steps,
        learning=learning,
        context_gradient_tokens=spec.context_gradient_tokens,
        kinds=() if only_check else tuple(s.WhichOneof("content") or "" for s in samples),
        sample_count=len(samples),
        options=options,
        epochs=spec.epochs or 1,
        samples_per_step=spec.samples_per_step or 1,
        seed=spec.seed if spec.HasField("seed") else None,
        max_seconds=_max_seconds(spec),
        guard=guard,
        coherence=coherence,
        dry_run=spec.dry_run,
        evaluate=spec.evaluate,
        tokens=tokens,
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
    most = {
        "epochs": MAX_EPOCHS,
        "samples_per_step": MAX_SAMPLES_PER_STEP,
        "evaluate_every_steps": 2**31 - 1,
        "context_gradient_tokens": MAX_OPEN_TOKENS,
    }
    wrong = {
        f"spec.{name}": f"is {getattr(spec, name)}; it must be from 0 (the default) to {limit}"
        for name, limit in most.items()
        if not 0 <= getattr(spec, name) <= limit
    }
    _require_none(wrong)


def _check_coherence(coherence: pb.Coherence) -> pb.Coherence:
    known: dict[str, Sequence[int]] = {
        "mode": pb.CoherenceMode.values(),
        "cache_policy": pb.CachePolicy.values(),
    }
    wrong = {
        f"spec.coherence.{name}": f"is {getattr(coherence, name)}, which this version does not know"
        for name, values in known.items()
        if getattr(coherence, name) not in values
    }
    _require_none(wrong, reason="OPTION_INVALID")
    return coherence


def _require_none(wrong: dict[str, str], reason: str = "") -> None:
    violations = [FieldViolation(field, why) for field, why in wrong.items()]
    if violations:
        message = f"{violations[0].field}: {violations[0].description}"
        raise InvalidArgument(message, violations=violations, reason=reason)

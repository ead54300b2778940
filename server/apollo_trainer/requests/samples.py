"""From the samples of a request to checked token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from apollo_grpc.errors import InvalidArgument, Quota
from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.structure import (
    Wrong,
    WrongSamples,
    check_factors,
    check_judgement,
)
from apollo_trainer.training.samples import TokenizedSample

# What vLLM is asked at once: some tenths of a second of its time.
BATCH_SAMPLES = 256
BATCH_BYTES = 2**20
_TEACHER_FIELDS = {
    "tokens": "teacher_context_ids",
    "text": "teacher_context",
    "chat": "teacher_messages",
}
# `Sidecar.tokenize`: an answer for each sample, in order.
Tokenize = Callable[[Sequence[pb.Sample]], Sequence[export_pb.TokenizedSample]]


@dataclass(frozen=True)
class SampleLimits:
    """What a sample must fit into.

    Attributes:
        vocabulary: token ids are below this.
        max_tokens: of context and continuation together, the engine's longest sequence.
        max_samples: of one run.
    """

    vocabulary: int
    max_tokens: int
    max_samples: int


@dataclass(frozen=True)
class Use:
    """What samples are for, and so what they must and may have.

    Attributes:
        path: of one of them in the request, with `{}` for its number.
        teacher: whether a teacher reads another context.
        policy: whether they were sampled, and judged.
        weighted: whether they may have weights.
        required: whether there must be one.
        plain: whether all but context and continuation is ignored.
        counted: whether they may be no more than a run's; a dataset has a limit of its own.
    """

    path: str = "spec.samples[{}]"
    teacher: bool = False
    policy: bool = False
    weighted: bool = True
    required: bool = False
    plain: bool = False
    counted: bool = True


LEARNED = Use(required=True)
DISTILLED = Use(required=True, teacher=True)
JUDGED = Use(required=True, policy=True)
ANCHORING = Use("spec.anchors.samples[{}]")
EVALUATED = Use("spec.evaluation_samples[{}]")
PROBED = Use("spec.probes[{}].sample", weighted=False)
ASKED = Use("samples[{}]", plain=True)


def why_refused(tokenize: Tokenize) -> str:
    """Which forms of samples this vLLM cannot make tokens of; sentences, empty where it can all.

    Raises Unavailable where it is away.
    """
    turns = ("user", "assistant") * 2
    messages = [pb.ChatMessage(role=role, content="Port Lumen") for role in turns]
    probes = {
        "Texts": pb.Sample(text=pb.TextSample(context="Port", continuation=" Lumen")),
        "Chats": pb.Sample(chat=pb.ChatSample(messages=messages)),
    }
    answers = zip(probes, tokenize(list(probes.values())), strict=True)
    refused = {name: answer.refusal for name, answer in answers if answer.refusal}
    return " ".join(f"{name} are refused: {why}." for name, why in refused.items())


def tokenize_samples(
    samples: Sequence[pb.Sample], limits: SampleLimits, tokenize: Tokenize
) -> list[TokenizedSample]:
    """All samples as token ids.

    Args:
        tokenize: asks vLLM, which blocks.

    Raises InvalidArgument with the path of each wrong field, the first 20 of them, and what
    `tokenize` raises.
    """
    return list(each_tokenized(samples, limits, tokenize))


def each_tokenized(
    samples: Collection[pb.Sample], limits: SampleLimits, tokenize: Tokenize, use: Use = LEARNED
) -> Iterator[TokenizedSample]:
    """The same, one sample after the other; the error comes once all were looked at."""
    whole = use.path.partition("[")[0]
    if use.required and not samples:
        raise InvalidArgument.at(whole, "is empty: nothing to learn")
    if use.counted and len(samples) > limits.max_samples:
        allowed = f"at most {limits.max_samples}"
        raise InvalidArgument.at(
            whole,
            f"has {len(samples)} samples; a run takes {allowed}",
            quota=Quota("samples", allowed),
        )
    violations = WrongSamples(use.path)
    for index, (sample, found) in enumerate(_with_ids(samples, tokenize)):
        try:
            yield _checked(sample, found, limits, use)
        except Wrong as wrong:
            violations.add(index, wrong)
            if violations.is_full():
                break
    violations.raise_any()


def _with_ids(
    samples: Iterable[pb.Sample], tokenize: Tokenize
) -> Iterator[tuple[pb.Sample, export_pb.TokenizedSample]]:
    """Each sample with its ids as given, or as vLLM makes them."""
    for batch in _batches(samples):
        asked = [sample for sample in batch if sample.WhichOneof("content") in ("text", "chat")]
        answers = iter(tokenize(asked) if asked else ())
        for sample in batch:
            if sample.WhichOneof("content") in ("text", "chat"):
                yield sample, next(answers)
            else:
                ids = sample.tokens
                yield (
                    sample,
                    export_pb.TokenizedSample(
                        context_ids=ids.context_ids,
                        continuation_ids=ids.continuation_ids,
                        teacher_context_ids=ids.teacher_context_ids,
                    ),
                )


def _batches(samples: Iterable[pb.Sample]) -> Iterator[list[pb.Sample]]:
    batch: list[pb.Sample] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += sample.ByteSize()
        if len(batch) == BATCH_SAMPLES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _checked(
    sample: pb.Sample, found: export_pb.TokenizedSample, limits: SampleLimits, use: Use
) -> TokenizedSample:
    kind = sample.WhichOneof("content")
    if kind is None:
        raise Wrong("", "needs one of tokens, text and chat")
    if found.refusal:
        raise Wrong(found.field, found.refusal)
    context, continuation = tuple(found.context_ids), tuple(found.continuation_ids)
    _check_ids(context, continuation, kind, limits)
    if use.plain:
        return TokenizedSample(context, continuation)
    teacher = _teacher_context(sample, found, limits, use)
    if not use.weighted and (sample.HasField("weight") or sample.token_weights):
        raise Wrong("weight" if sample.HasField("weight") else "token_weights", "has no use here")
    weight = sample.weight if sample.HasField("weight") else 1.0
    check_factors(sample, len(continuation))
    token_weights = tuple(sample.token_weights)
    advantages, log_probs = _judgement(sample, len(continuation), use)
    return TokenizedSample(
        context, continuation, weight, token_weights, teacher, advantages, log_probs
    )


def _teacher_context(
    sample: pb.Sample, found: export_pb.TokenizedSample, limits: SampleLimits, use: Use
) -> tuple[int, ...]:
    """What the teacher reads; empty where there is none."""
    kind, ids = sample.WhichOneof("content") or "", tuple(found.teacher_context_ids)
    field = f"{kind}.{_TEACHER_FIELDS[kind]}"
    if bool(ids) != use.teacher:
        needs = "is empty: the teacher reads it in place of the context"
        raise Wrong(field, needs if use.teacher else "is for spec.context_distillation alone")
    _check_vocabulary(field, ids, kind, limits)
    if len(ids) + len(found.continuation_ids) > limits.max_tokens:
        says = f"makes {len(ids) + len(found.continuation_ids)} tokens with the continuation"
        raise Wrong(field, f"{says}; the served model takes at most {limits.max_tokens}")
    return ids


def _judgement(
    sample: pb.Sample, tokens: int, use: Use
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Advantages and the sampler's log-probabilities, one a token; empty without a policy."""
    advantages, log_probs = tuple(sample.advantages), tuple(sample.sampler_log_probabilities)
    if not use.policy:
        for name, given in (("advantages", advantages), ("sampler_log_probabilities", log_probs)):
            if given:
                raise Wrong(name, "is for samples of spec.policy_gradient alone")
        return (), ()
    check_judgement(sample, tokens)
    if len(advantages) == 1:
        advantages *= tokens
    return advantages, log_probs


def _check_ids(
    context: tuple[int, ...], continuation: tuple[int, ...], kind: str, limits: SampleLimits
) -> None:
    parts = {"tokens": ("tokens.context_ids", "tokens.continuation_ids")}.get(
        kind, (f"{kind}.context", f"{kind}.continuation") if kind == "text" else (kind, kind)
    )
    if not continuation:
        raise Wrong(parts[1], "is empty: nothing to learn")
    if not context:
        raise Wrong(parts[0], "is empty: the first continuation token needs one before it")
    for path, ids in zip(parts, (context, continuation), strict=True):
        _check_vocabulary(path, ids, kind, limits)
    total = len(context) + len(continuation)
    if total > limits.max_tokens:
        raise Wrong(kind, f"has {total} tokens; the served model takes at most {limits.max_tokens}")


def _check_vocabulary(path: str, ids: tuple[int, ...], kind: str, limits: SampleLimits) -> None:
    wrong = next((i for i, t in enumerate(ids) if not 0 <= t < limits.vocabulary), None)
    if wrong is not None:
        raise Wrong(
            f"{path}[{wrong}]" if kind == "tokens" else path,
            f"token id {ids[wrong]} is outside the vocabulary of {limits.vocabulary}",
        )

"""From the samples of a request to checked token ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.training.samples import TokenizedSample

MAX_VIOLATIONS = 20
# Far above any use, far below what overflows a float32 loss.
MAX_WEIGHT = 1e6
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
    """

    path: str = "spec.samples[{}]"
    teacher: bool = False
    policy: bool = False
    weighted: bool = True
    required: bool = False


LEARNED = Use(required=True)
DISTILLED = Use(required=True, teacher=True)
JUDGED = Use(required=True, policy=True)
ANCHORING = Use("spec.anchors.samples[{}]")
EVALUATED = Use("spec.evaluation_samples[{}]")
PROBED = Use("spec.probes[{}].sample", weighted=False)


class _Wrong(Exception):
    def __init__(self, field: str, description: str):
        super().__init__(description)
        self.field, self.description = field, description


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
    samples: Sequence[pb.Sample], limits: SampleLimits, tokenize: Tokenize, use: Use = LEARNED
) -> Iterator[TokenizedSample]:
    """The same, one sample after the other; the error comes once all were looked at."""
    whole = use.path.partition("[")[0]
    if use.required and not samples:
        raise InvalidArgument.at(whole, "is empty: nothing to learn")
    if len(samples) > limits.max_samples:
        raise InvalidArgument.at(
            whole, f"has {len(samples)} samples; a run takes at most {limits.max_samples}"
        )
    violations: list[FieldViolation] = []
    for index, (sample, found) in enumerate(_with_ids(samples, tokenize)):
        try:
            yield _checked(sample, found, limits, use)
        except _Wrong as wrong:
            path = use.path.format(index) + (f".{wrong.field}" if wrong.field else "")
            violations.append(FieldViolation(path, wrong.description))
            if len(violations) == MAX_VIOLATIONS:
                break
    if violations:
        first = violations[0]
        raise InvalidArgument(
            f"{first.field}: {first.description}"
            + (f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""),
            violations=violations,
            reason="SAMPLE_INVALID",
        )


def _with_ids(
    samples: Sequence[pb.Sample], tokenize: Tokenize
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


def _batches(samples: Sequence[pb.Sample]) -> Iterator[list[pb.Sample]]:
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
        raise _Wrong("", "needs one of tokens, text and chat")
    if found.refusal:
        raise _Wrong(found.field, found.refusal)
    context, continuation = tuple(found.context_ids), tuple(found.continuation_ids)
    _check_ids(context, continuation, kind, limits)
    teacher = _teacher_context(sample, found, limits, use)
    if not use.weighted and (sample.HasField("weight") or sample.token_weights):
        raise _Wrong("weight" if sample.HasField("weight") else "token_weights", "has no use here")
    weight = sample.weight if sample.HasField("weight") else 1.0
    if not 0 <= weight <= MAX_WEIGHT:
        raise _Wrong("weight", f"is {weight:g}; it must be from 0 to {MAX_WEIGHT:g}")
    token_weights = tuple(sample.token_weights)
    if token_weights and len(token_weights) != len(continuation):
        raise _Wrong(
            "token_weights",
            f"has {len(token_weights)} entries for {len(continuation)} continuation tokens",
        )
    if not all(0 <= w <= MAX_WEIGHT for w in token_weights):
        raise _Wrong("token_weights", f"must be from 0 to {MAX_WEIGHT:g}")
    # The product too: two tiny weights make none.
    if not any(weight * factor for factor in token_weights or (1.0,)):
        raise _Wrong("weight" if weight == 0 else "token_weights", "leave nothing to learn")
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
        raise _Wrong(field, needs if use.teacher else "is for spec.context_distillation alone")
    _check_vocabulary(field, ids, kind, limits)
    if len(ids) + len(found.continuation_ids) > limits.max_tokens:
        says = f"makes {len(ids) + len(found.continuation_ids)} tokens with the continuation"
        raise _Wrong(field, f"{says}; the served model takes at most {limits.max_tokens}")
    return ids


def _judgement(
    sample: pb.Sample, tokens: int, use: Use
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Advantages and the sampler's log-probabilities, one a token; empty without a policy."""
    advantages, log_probs = tuple(sample.advantages), tuple(sample.sampler_log_probabilities)
    if not use.policy:
        for name, given in (("advantages", advantages), ("sampler_log_probabilities", log_probs)):
            if given:
                raise _Wrong(name, "is for samples of spec.policy_gradient alone")
        return (), ()
    if len(advantages) == 1:
        advantages *= tokens
    if len(advantages) != tokens:
        says = f"has {len(advantages)} entries; it needs one, or one for each of {tokens} tokens"
        raise _Wrong("advantages", says)
    if not all(math.isfinite(a) and abs(a) <= MAX_WEIGHT for a in advantages):
        raise _Wrong("advantages", f"must be from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    if len(log_probs) != tokens:
        says = f"has {len(log_probs)} entries for {tokens} continuation tokens"
        raise _Wrong("sampler_log_probabilities", says)
    if not all(math.isfinite(p) and p <= 0 for p in log_probs):
        raise _Wrong("sampler_log_probabilities", "must be finite, and 0 or below")
    return advantages, log_probs


def _check_ids(
    context: tuple[int, ...], continuation: tuple[int, ...], kind: str, limits: SampleLimits
) -> None:
    parts = {"tokens": ("tokens.context_ids", "tokens.continuation_ids")}.get(
        kind, (f"{kind}.context", f"{kind}.continuation") if kind == "text" else (kind, kind)
    )
    if not continuation:
        raise _Wrong(parts[1], "is empty: nothing to learn")
    if not context:
        raise _Wrong(parts[0], "is empty: the first continuation token needs one before it")
    for path, ids in zip(parts, (context, continuation), strict=True):
        _check_vocabulary(path, ids, kind, limits)
    total = len(context) + len(continuation)
    if total > limits.max_tokens:
        raise _Wrong(
            kind, f"has {total} tokens; the served model takes at most {limits.max_tokens}"
        )


def _check_vocabulary(path: str, ids: tuple[int, ...], kind: str, limits: SampleLimits) -> None:
    wrong = next((i for i, t in enumerate(ids) if not 0 <= t < limits.vocabulary), None)
    if wrong is not None:
        raise _Wrong(
            f"{path}[{wrong}]" if kind == "tokens" else path,
            f"token id {ids[wrong]} is outside the vocabulary of {limits.vocabulary}",
        )

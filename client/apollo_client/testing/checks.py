"""What is wrong with specs and samples, as far as a fake server looks at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from apollo_client.testing.paging import refuse
from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

VOCABULARY, MAX_LENGTH, MAX_BYTES = 200_000, 32_768, 256
MAX_SHOWN = 20
_Rule = tuple[Callable[[float], bool], str]
_ABOVE_ZERO: _Rule = (lambda x: x > 0, "must be above 0")
_NOT_NEGATIVE: _Rule = (lambda x: x >= 0, "must not be negative")
_BELOW_ONE: _Rule = (lambda x: 0 <= x < 1, "must be at least 0 and below 1")
_OPTIONS: dict[str, _Rule] = {
    "lr": _NOT_NEGATIVE,
    "rank": _ABOVE_ZERO,
    "beta1": _BELOW_ONE,
    "beta2": _BELOW_ONE,
    "eps": _ABOVE_ZERO,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
}
_GUARD: dict[str, _Rule] = {
    "max_loss": _ABOVE_ZERO,
    "max_grad_norm": _ABOVE_ZERO,
    "max_update_ratio": _ABOVE_ZERO,
    "min_loss": _NOT_NEGATIVE,
}


def tokens_of(sample: pb.Sample) -> pb.TokenCount:
    """How many tokens a sample has; of texts and chats each word is one."""
    if sample.HasField("tokens"):
        context, continuation = len(sample.tokens.context_ids), len(sample.tokens.continuation_ids)
    elif sample.HasField("text"):
        context = len(sample.text.context.split())
        continuation = max(1, len(sample.text.continuation.split()))
    else:
        *before, last = [len(message.content.split()) for message in sample.chat.messages]
        context, continuation = sum(before), max(1, last)
    return pb.TokenCount(context_tokens=context, continuation_tokens=continuation)


def check_samples(samples: Sequence[pb.Sample], path: str, first: int = 0) -> None:
    """Raises InvalidArgument with the path of each wrong field, the first 20 of them.

    Args:
        path: of one of them, with `{}` for its number.
        first: the number of its first sample.
    """
    wrong = [
        FieldViolation(path.format(number) + (f".{field}" if field else ""), says)
        for number, sample in enumerate(samples, first)
        for field, says in _wrong_with(sample)
    ]
    refuse(wrong[:MAX_SHOWN], "SAMPLE_INVALID")


def _wrong_with(sample: pb.Sample) -> Iterator[tuple[str, str]]:
    if sample.WhichOneof("content") is None:
        yield "", "needs one of tokens, text and chat"
    elif sample.HasField("tokens"):
        yield from _wrong_ids(sample.tokens)
    elif sample.HasField("text") and not sample.text.continuation:
        yield "text.continuation", "is empty: nothing to learn"
    elif sample.HasField("chat") and not sample.chat.messages:
        yield "chat.messages", "is empty: nothing to learn"


def _wrong_ids(ids: pb.TokenSample) -> Iterator[tuple[str, str]]:
    if len(ids.context_ids) + len(ids.continuation_ids) > MAX_LENGTH:
        yield "tokens", f"has more than the {MAX_LENGTH} tokens that the model takes"
    for name in ("context_ids", "continuation_ids"):
        listed = getattr(ids, name)
        if not listed:
            yield f"tokens.{name}", "is empty"
        for index, token in enumerate(listed):
            if not 0 <= token < VOCABULARY:
                yield f"tokens.{name}[{index}]", f"is {token}, which the vocabulary has not"


def check_request_id(request_id: str) -> None:
    """Raises InvalidArgument for one that is too long."""
    if len(request_id.encode()) > MAX_BYTES:
        raise InvalidArgument.at("request_id", f"is longer than {MAX_BYTES} bytes")


def check_spec(spec: pb.RunSpec, samples: Sequence[pb.Sample]) -> None:
    """Raises InvalidArgument with the path of each wrong field.

    Args:
        samples: that are learned: the spec's or its dataset's.
    """
    if not samples:
        raise InvalidArgument.at("spec.samples", "are empty: nothing to learn")
    for listed, path in (
        (samples, "spec.samples[{}]"),
        (spec.evaluation_samples, "spec.evaluation_samples[{}]"),
        (spec.anchors.samples, "spec.anchors.samples[{}]"),
        ([probe.sample for probe in spec.probes], "spec.probes[{}].sample"),
    ):
        check_samples(listed, path)
    wrong = [*_wrong_values(spec.optimizer, "optimizer", _OPTIONS)]
    wrong += _wrong_values(spec.guard, "guard", _GUARD)
    wrong += _wrong_of_spec(spec)
    refuse(wrong)


def _wrong_values(
    message: pb.OptimizerConfig | pb.Guard, path: str, rules: dict[str, _Rule]
) -> Iterator[FieldViolation]:
    given = {field.name: value for field, value in message.ListFields()}
    for name, (holds, says) in rules.items():
        if name in given and not holds(given[name]):
            yield FieldViolation(f"spec.{path}.{name}", f"is {given[name]:g}; it {says}")


def _wrong_of_spec(spec: pb.RunSpec) -> Iterator[FieldViolation]:
    for name in ("samples_per_step", "epochs", "evaluate_every_steps"):
        if getattr(spec, name) < 0:
            yield FieldViolation(f"spec.{name}", "must not be negative")
    labels = [*spec.labels, *spec.labels.values()]
    for name, texts in (("name", [spec.name]), ("labels", labels)):
        if any(len(text.encode()) > MAX_BYTES for text in texts):
            yield FieldViolation(f"spec.{name}", f"is longer than {MAX_BYTES} bytes")

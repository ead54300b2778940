"""From the samples of a request to checked token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.training.samples import TokenizedSample

MAX_VIOLATIONS = 20
# Far above any use, far below what overflows a float32 loss.
MAX_WEIGHT = 1e6


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


class _Wrong(Exception):
    def __init__(self, field: str, description: str):
        super().__init__(description)
        self.field, self.description = field, description


def tokenize_samples(
    samples: Sequence[pb.Sample], limits: SampleLimits, tokenizer: Any
) -> list[TokenizedSample]:
    """All samples as token ids.

    Args:
        tokenizer: the served model's, with its chat template; None where the directory has none.

    Raises InvalidArgument with the path of each wrong field, the first 20 of them.
    """
    return list(each_tokenized(samples, limits, tokenizer))


def each_tokenized(
    samples: Sequence[pb.Sample], limits: SampleLimits, tokenizer: Any
) -> Iterator[TokenizedSample]:
    """The same, one sample after the other; the error comes once all were looked at."""
    if not samples:
        raise InvalidArgument.at("spec.samples", "is empty: nothing to learn")
    if len(samples) > limits.max_samples:
        raise InvalidArgument.at(
            "spec.samples", f"has {len(samples)} samples; a run takes at most {limits.max_samples}"
        )
    violations: list[FieldViolation] = []
    for index, sample in enumerate(samples):
        try:
            yield _tokenize(sample, limits, tokenizer)
        except _Wrong as wrong:
            path = f"spec.samples[{index}]" + (f".{wrong.field}" if wrong.field else "")
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


def _tokenize(sample: pb.Sample, limits: SampleLimits, tokenizer: Any) -> TokenizedSample:
    kind = sample.WhichOneof("content")
    if kind is None:
        raise _Wrong("", "needs one of tokens, text and chat")
    if kind != "tokens" and tokenizer is None:
        raise _Wrong(kind, "the served model has no tokenizer; send tokens")
    context, continuation = {"tokens": _from_ids, "text": _from_text, "chat": _from_chat}[kind](
        sample, tokenizer
    )
    _check_ids(context, continuation, kind, limits)
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
    return TokenizedSample(tuple(context), tuple(continuation), weight, token_weights)


def _from_ids(sample: pb.Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    return list(sample.tokens.context_ids), list(sample.tokens.continuation_ids)


def _from_text(sample: pb.Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    text = sample.text
    if not text.continuation:
        raise _Wrong("text.continuation", "is empty: nothing to learn")
    # With the special tokens that a prompt of vLLM's gets.
    context = tokenizer(text.context)["input_ids"]
    whole = tokenizer(text.context + text.continuation)["input_ids"]
    found = _cut(tokenizer, context, whole, text.continuation)
    if found is None:
        raise _Wrong(
            "text.continuation",
            "has no tokens of its own there: the served model's tokenizer reads both texts "
            "together in another way. Cut between words, or send tokens",
        )
    return context, found


def _from_chat(sample: pb.Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    messages = [{"role": m.role, "content": m.content} for m in sample.chat.messages]
    if not messages or messages[-1]["role"] != "assistant":
        raise _Wrong("chat.messages", "must end with an assistant message: that is what is learned")
    if len(messages) < 2:
        raise _Wrong("chat.messages", "needs a message before the assistant's")
    if not tokenizer.chat_template:
        raise _Wrong("chat", "the served model has no chat template; send text or tokens")
    try:
        context = _render(tokenizer, messages[:-1], add_generation_prompt=True)
        whole = _render(tokenizer, messages, add_generation_prompt=False)
    except Exception as error:
        raise _Wrong("chat.messages", f"the chat template refuses them: {error}") from error
    context_ids, whole_ids = (_ids(tokenizer, text) for text in (context, whole))
    answer = whole[len(context) :] if whole.startswith(context) else None
    found = _cut(tokenizer, context_ids, whole_ids, answer)
    if found is None:
        raise _Wrong(
            "chat.messages",
            "the chat template renders the conversation differently with its last answer; "
            "send text or tokens",
        )
    return context_ids, _up_to_the_end(found, tokenizer)


def _cut(
    tokenizer: Any, context: list[int], whole: list[int], continuation: str | None
) -> list[int] | None:
    """The token ids that go on after the context's, or None where there are none that fit.

    Read by itself where that makes the same text: generation goes on after the prompt's own
    tokens. A tokenizer that puts a space before every text needs it read together.
    """
    if continuation is not None:
        alone = _ids(tokenizer, continuation)
        if _text(tokenizer, context + alone) == _text(tokenizer, whole):
            return alone
    return whole[len(context) :] if whole[: len(context)] == context else None


def _up_to_the_end(answer: list[int], tokenizer: Any) -> list[int]:
    """An answer without what a template writes after the end mark: it is never generated."""
    end = tokenizer.eos_token_id
    if end not in answer:
        return answer
    return answer[: len(answer) - answer[::-1].index(end)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _text(tokenizer: Any, ids: list[int]) -> str:
    # Special tokens that a tokenizer adds at the end of a prompt stand elsewhere in the whole.
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _render(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    )


def _check_ids(
    context: list[int], continuation: list[int], kind: str, limits: SampleLimits
) -> None:
    parts = {"tokens": ("tokens.context_ids", "tokens.continuation_ids")}.get(
        kind, (f"{kind}.context", f"{kind}.continuation") if kind == "text" else (kind, kind)
    )
    if not continuation:
        raise _Wrong(parts[1], "is empty: nothing to learn")
    if not context:
        raise _Wrong(parts[0], "is empty: the first continuation token needs one before it")
    for path, ids in zip(parts, (context, continuation), strict=True):
        wrong = next((i for i, t in enumerate(ids) if not 0 <= t < limits.vocabulary), None)
        if wrong is not None:
            raise _Wrong(
                f"{path}[{wrong}]" if kind == "tokens" else path,
                f"token id {ids[wrong]} is outside the vocabulary of {limits.vocabulary}",
            )
    total = len(context) + len(continuation)
    if total > limits.max_tokens:
        raise _Wrong(
            kind, f"has {total} tokens; the served model takes at most {limits.max_tokens}"
        )

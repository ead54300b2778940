"""What is wrong with a sample whatever the model is: no token is made of it, and no vLLM asked."""

from __future__ import annotations

import math
from collections.abc import Iterable

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

MAX_VIOLATIONS = 20
# Far above any use, far below what overflows a float32 loss.
MAX_WEIGHT = 1e6


class Wrong(Exception):
    """A field of a sample, by its path in it, and why it is refused."""

    def __init__(self, field: str, description: str):
        super().__init__(description)
        self.field, self.description = field, description


class WrongSamples:
    """Wrong fields of many samples: the first 20 are kept.

    Args:
        path: of one sample in the request, with `{}` for its number.
    """

    def __init__(self, path: str):
        self._path, self._found = path, list[FieldViolation]()

    def add(self, number: int, wrong: Wrong) -> None:
        """One more."""
        path = self._path.format(number) + (f".{wrong.field}" if wrong.field else "")
        self._found.append(FieldViolation(path, wrong.description))

    def is_full(self) -> bool:
        """Whether there is no use in looking further."""
        return len(self._found) >= MAX_VIOLATIONS

    def raise_any(self) -> None:
        """Raises InvalidArgument with SAMPLE_INVALID where there is one."""
        if not self._found:
            return
        first, more = self._found[0], len(self._found) - 1
        raise InvalidArgument(
            f"{first.field}: {first.description}" + (f" (and {more} more)" if more else ""),
            violations=self._found,
            reason="SAMPLE_INVALID",
        )


def require_structure(samples: Iterable[pb.Sample], path: str, first: int) -> None:
    """Checks samples that are kept for later.

    Args:
        path: of one of them, with `{}` for its number.
        first: number of the first one.

    Raises InvalidArgument with the path of each wrong field, the first 20 of them.
    """
    wrong = WrongSamples(path)
    for number, sample in enumerate(samples, first):
        try:
            _check(sample)
        except Wrong as error:
            wrong.add(number, error)
            if wrong.is_full():
                break
    wrong.raise_any()


def _check(sample: pb.Sample) -> None:
    kind, tokens = sample.WhichOneof("content"), None
    if kind is None:
        raise Wrong("", "needs one of tokens, text and chat")
    if kind == "tokens":
        tokens = len(sample.tokens.continuation_ids)
        _check_ids(sample.tokens)
    elif kind == "text" and not sample.text.continuation:
        raise Wrong("text.continuation", "is empty: nothing to learn")
    elif kind == "chat" and not sample.chat.messages:
        raise Wrong("chat.messages", "is empty: nothing to learn")
    check_factors(sample, tokens)
    if sample.advantages or sample.sampler_log_probabilities:
        check_judgement(sample, tokens)


def _check_ids(ids: pb.TokenSample) -> None:
    if not ids.continuation_ids:
        raise Wrong("tokens.continuation_ids", "is empty: nothing to learn")
    if not ids.context_ids:
        says = "is empty: the first continuation token needs one before it"
        raise Wrong("tokens.context_ids", says)
    for name in ("context_ids", "continuation_ids", "teacher_context_ids"):
        listed = getattr(ids, name)
        if min(listed, default=0) < 0:
            wrong = next(index for index, token in enumerate(listed) if token < 0)
            raise Wrong(f"tokens.{name}[{wrong}]", "is negative: no token id is")


def check_factors(sample: pb.Sample, tokens: int | None) -> None:
    """Checks what a sample's loss is multiplied by.

    Args:
        tokens: of the continuation; None where that is not known.
    """
    weight = sample.weight if sample.HasField("weight") else 1.0
    if not 0 <= weight <= MAX_WEIGHT:
        raise Wrong("weight", f"is {weight:g}; it must be from 0 to {MAX_WEIGHT:g}")
    factors = sample.token_weights
    if factors and tokens is not None and len(factors) != tokens:
        raise Wrong("token_weights", f"has {len(factors)} entries for {tokens} continuation tokens")
    if not all(0 <= factor <= MAX_WEIGHT for factor in factors):
        raise Wrong("token_weights", f"must be from 0 to {MAX_WEIGHT:g}")
    # The product too: two tiny weights make none.
    if not any(weight * factor for factor in factors or (1.0,)):
        raise Wrong("weight" if weight == 0 else "token_weights", "leave nothing to learn")


def check_judgement(sample: pb.Sample, tokens: int | None) -> None:
    """Checks what a policy gradient needs of a sample that was sampled; `tokens` likewise."""
    advantages, log_probs = sample.advantages, sample.sampler_log_probabilities
    if tokens is not None and len(advantages) not in (1, tokens):
        says = f"has {len(advantages)} entries; it needs one, or one for each of {tokens} tokens"
        raise Wrong("advantages", says)
    if not all(math.isfinite(a) and abs(a) <= MAX_WEIGHT for a in advantages):
        raise Wrong("advantages", f"must be from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    if tokens is not None and len(log_probs) != tokens:
        says = f"has {len(log_probs)} entries for {tokens} continuation tokens"
        raise Wrong("sampler_log_probabilities", says)
    if not all(math.isfinite(p) and p <= 0 for p in log_probs):
        raise Wrong("sampler_log_probabilities", "must be finite, and 0 or below")

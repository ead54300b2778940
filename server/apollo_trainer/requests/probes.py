"""The probes of a request, and what a run must reach to be kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.samples import PROBED, SampleLimits, Tokenize, each_tokenized

MAX_ANSWER_TOKENS = 4096
MAX_NAME_BYTES = 256
ANSWER_TOKENS = 32
MIN_LOG_PROBABILITY = -1.0


@dataclass(frozen=True)
class Question:
    """A probe with its token ids.

    Attributes:
        room: tokens that the model takes after the prompt.
        regression: whether it is of the model's regression set.
    """

    name: str
    probe: pb.Probe
    prompt_ids: tuple[int, ...]
    expected_ids: tuple[int, ...]
    room: int
    regression: bool = False

    @property
    def role(self) -> pb.ProbeRole.ValueType:
        """What it is asked for."""
        learns = self.probe.role != pb.PROBE_ROLE_KEEP and not self.regression
        return pb.PROBE_ROLE_LEARN if learns else pb.PROBE_ROLE_KEEP

    @property
    def prompt(self) -> export_pb.Prompt:
        """What vLLM is asked."""
        scored = self.probe.check == pb.PROBE_CHECK_LOG_PROBABILITY
        return export_pb.Prompt(
            token_ids=self.prompt_ids,
            max_tokens=0 if scored else self._most_tokens(),
            expected_ids=self.expected_ids,
        )

    def _most_tokens(self) -> int:
        exact = self.probe.check == pb.PROBE_CHECK_EXACT
        most = self.probe.max_tokens or (len(self.expected_ids) if exact else ANSWER_TOKENS)
        return min(most, self.room)

    def result(self, answer: export_pb.Answer) -> pb.ProbeResult:
        """What vLLM's answer says."""
        found = pb.ProbeResult(
            name=self.name,
            role=self.role,
            regression=self.regression,
            expected=answer.expected_text,
            answer=answer.text,
        )
        if self.probe.check == pb.PROBE_CHECK_LOG_PROBABILITY:
            each = answer.expected_log_probabilities
            found.log_probability = math.fsum(each) / max(1, len(each))
            found.passed = found.log_probability >= self._least()
        elif self.probe.check == pb.PROBE_CHECK_EXACT:
            found.passed = tuple(answer.token_ids[: len(self.expected_ids)]) == self.expected_ids
        else:
            found.passed = _folded(answer.expected_text) in _folded(answer.text)
        return found

    def _least(self) -> float:
        given = self.probe.HasField("min_log_probability")
        return self.probe.min_log_probability if given else MIN_LOG_PROBABILITY


def _folded(text: str) -> str:
    return text.strip().casefold()


def read_probes(
    probes: Sequence[pb.Probe],
    limits: SampleLimits,
    tokenize: Tokenize,
    *,
    regression: bool = False,
) -> tuple[Question, ...]:
    """The probes of a request, or of the regression set.

    Raises InvalidArgument with the path of each wrong field, and what `tokenize` raises.
    """
    _check(probes)
    samples = [probe.sample for probe in probes]
    # vLLM scores a prompt only where one token more would fit.
    fitting = replace(limits, max_tokens=limits.max_tokens - 1)
    use = replace(PROBED, path="regression_set[{}].sample") if regression else PROBED
    tokenized = each_tokenized(samples, fitting, tokenize, use) if samples else ()
    return tuple(
        Question(
            probe.name or str(index),
            probe,
            found.context_ids,
            found.continuation_ids,
            limits.max_tokens - len(found.context_ids),
            regression,
        )
        for index, (probe, found) in enumerate(zip(probes, tokenized, strict=True))
    )


def read_accept_if(accept: pb.AcceptIf) -> pb.AcceptIf:
    """What a run must reach. Raises InvalidArgument with the path of a wrong field."""
    for name in ("max_failed", "max_lost"):
        if getattr(accept, name) < 0:
            raise InvalidArgument.at(f"spec.accept_if.{name}", "must not be negative")
    if accept.HasField("max_anchor_kl"):
        limit = accept.max_anchor_kl
        if not (math.isfinite(limit) and limit > 0):
            raise InvalidArgument.at("spec.accept_if.max_anchor_kl", "must be finite and above 0")
    return accept


def _check(probes: Sequence[pb.Probe]) -> None:
    names = set[str]()
    for index, probe in enumerate(probes):
        path = f"spec.probes[{index}]"
        name = probe.name or str(index)
        if name in names:
            raise InvalidArgument.at(f"{path}.name", f"is {name!r}, which another probe has")
        names.add(name)
        if len(name.encode()) > MAX_NAME_BYTES:
            raise InvalidArgument.at(f"{path}.name", f"is longer than {MAX_NAME_BYTES} bytes")
        for field, values in (("check", pb.ProbeCheck), ("role", pb.ProbeRole)):
            if getattr(probe, field) not in values.values():
                says = f"is {getattr(probe, field)}, which this version does not know"
                raise InvalidArgument.at(f"{path}.{field}", says)
        _check_numbers(probe, path)


def _check_numbers(probe: pb.Probe, path: str) -> None:
    if not 0 <= probe.max_tokens <= MAX_ANSWER_TOKENS:
        says = f"is {probe.max_tokens}; it must be from 0 (the default) to {MAX_ANSWER_TOKENS}"
        raise InvalidArgument.at(f"{path}.max_tokens", says)
    if probe.HasField("min_log_probability"):
        least = probe.min_log_probability
        if not (math.isfinite(least) and least <= 0):
            raise InvalidArgument.at(
                f"{path}.min_log_probability", f"is {least:g}; it must be 0 or below"
            )
        if probe.check != pb.PROBE_CHECK_LOG_PROBABILITY:
            says = "is for PROBE_CHECK_LOG_PROBABILITY alone"
            raise InvalidArgument.at(f"{path}.min_log_probability", says)

"""Probes as people write them: a question, what is expected, and how that is looked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from apollo_client.fields import put
from apollo_client.placing import PROBE_KEYS, Placed
from apollo_client.sample_values import is_nothing
from apollo_client.samples import to_samples
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

ProbeLike: TypeAlias = pb.Probe | Placed[pb.Probe] | Mapping[str, Any]

_FIELDS = ("name", "check", "role", "max_tokens", "min_log_probability")
_THEIRS = re.compile(rf"\b({'|'.join(PROBE_KEYS)})\b")
PROBE_FORMS = (
    '{"prompt": "...", "expected": "..."}, '
    '{"context_ids": [...], "continuation_ids": [...]} or '
    '{"messages": [{"role": "user", "content": "..."}, ...]}'
)


def to_probe(value: ProbeLike) -> pb.Probe:
    """One probe.

    Args:
        value: a `Probe`, or a mapping of one of three forms: `prompt` and `expected`; `context_ids`
            and `continuation_ids`; `messages`, whose last one is the expected answer. Each may have
            `name`, `check` ("contains", "exact" or "log_probability"), `role` ("learn" or "keep"),
            `max_tokens` and `min_log_probability`. None is the same as a key that is missing.

    Raises InvalidArgument for anything else.
    """
    if isinstance(value, Placed):
        value = value.value
    if isinstance(value, pb.Probe):
        return value
    if not isinstance(value, Mapping):
        raise InvalidArgument.at("probe", f"is no object of one of the forms {PROBE_FORMS}")
    rest = {key: each for key, each in value.items() if key not in _FIELDS}
    probe = pb.Probe(sample=_asked(rest))
    for field in _FIELDS:
        if value.get(field) is not None:
            put(probe, field, value[field])
    return probe


def _asked(fields: dict[str, Any]) -> pb.Sample:
    for theirs, ours in PROBE_KEYS.items():
        if not is_nothing(fields.get(theirs)):
            raise InvalidArgument.at(theirs, f"is called {ours} in a probe")
        fields[theirs] = fields.pop(ours, None)
    try:
        samples = to_samples(fields)
    except InvalidArgument as error:
        raise _of_a_probe(error) from error
    if len(samples) != 1:
        raise InvalidArgument.at("messages", f"have {len(samples)} answers; a probe has one")
    return samples[0]


def _of_a_probe(error: InvalidArgument) -> InvalidArgument:
    """What is wrong with its sample, by a probe's own keys."""
    (wrong,) = error.violations
    if wrong.field == "sample":
        return InvalidArgument.at("probe", f"is not of one of the forms {PROBE_FORMS}")
    description = _THEIRS.sub(lambda found: PROBE_KEYS[found[0]], wrong.description)
    return InvalidArgument.at(PROBE_KEYS.get(wrong.field, wrong.field), description)

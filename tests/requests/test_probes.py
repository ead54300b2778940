"""Probes: what vLLM is asked, and what its answer says."""

from __future__ import annotations

from typing import Any

import pytest

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.probes import Question, read_accept_if, read_probes
from apollo_trainer.requests.samples import SampleLimits

LIMITS = SampleLimits(vocabulary=100, max_tokens=16, max_samples=8)
CONTAINS, EXACT, LIKELY = (
    pb.PROBE_CHECK_CONTAINS,
    pb.PROBE_CHECK_EXACT,
    pb.PROBE_CHECK_LOG_PROBABILITY,
)


def nobody(*_: Any) -> Any:
    raise AssertionError("vLLM is asked about token ids")


def probe(**fields: Any) -> pb.Probe:
    tokens = pb.TokenSample(context_ids=[1, 2], continuation_ids=[3, 4])
    return pb.Probe(**{"sample": pb.Sample(tokens=tokens)} | fields)


def question(**fields: Any) -> Question:
    (found,) = read_probes([probe(**fields)], LIMITS, nobody)
    return found


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"max_tokens": 5}, 5),
        # 14 more fit into the model; 32 are the default.
        ({}, 14),
        ({"check": EXACT}, 2),
        ({"check": LIKELY}, 0),
    ],
)
def test_an_answer_is_as_long_as_its_check_needs(fields: dict[str, Any], most: int) -> None:
    assert question(**fields).prompt == export_pb.Prompt(
        token_ids=[1, 2], max_tokens=most, expected_ids=[3, 4]
    )


@pytest.mark.parametrize(
    ("check", "answer", "passed"),
    [
        (CONTAINS, {"text": "It is port LUMEN.", "expected_text": " Port Lumen"}, True),
        (CONTAINS, {"text": "It is a port.", "expected_text": " Port Lumen"}, False),
        (EXACT, {"token_ids": [3, 4, 9]}, True),
        (EXACT, {"token_ids": [3]}, False),
        (LIKELY, {"expected_log_probabilities": [-1.5, -0.4]}, True),
        (LIKELY, {"expected_log_probabilities": [-1.5, -0.6]}, False),
    ],
)
def test_a_check_passes_or_not(check: Any, answer: dict[str, Any], passed: bool) -> None:
    assert question(check=check).result(export_pb.Answer(**answer)).passed is passed


def test_a_probe_of_the_regression_set_is_to_be_kept_whatever_it_was_for() -> None:
    (asked,) = read_probes([probe(name="fact")], LIMITS, nobody, regression=True)
    assert (asked.role, asked.regression) == (pb.PROBE_ROLE_KEEP, True)
    assert question().role == pb.PROBE_ROLE_LEARN


@pytest.mark.parametrize(
    ("field", "probes"),
    [
        ("spec.probes[1].name", [probe(name="a"), probe(name="a")]),
        # The first one's name is its number.
        ("spec.probes[1].name", [probe(), probe(name="0")]),
        ("spec.probes[0].name", [probe(name="x" * 300)]),
        ("spec.probes[0].check", [probe(check=9)]),
        ("spec.probes[0].role", [probe(role=9)]),
        ("spec.probes[0].max_tokens", [probe(max_tokens=-1)]),
        ("spec.probes[0].min_log_probability", [probe(min_log_probability=-1)]),
        ("spec.probes[0].min_log_probability", [probe(check=LIKELY, min_log_probability=0.5)]),
        ("spec.probes[0].sample", [pb.Probe()]),
        (
            "spec.probes[0].sample.weight",
            [probe(sample=pb.Sample(tokens=probe().sample.tokens, weight=2))],
        ),
    ],
)
def test_a_wrong_field_is_named(field: str, probes: list[pb.Probe]) -> None:
    with pytest.raises(InvalidArgument) as error:
        read_probes(probes, LIMITS, nobody)
    assert [violation.field for violation in error.value.violations] == [field]


@pytest.mark.parametrize(
    ("field", "accept"),
    [
        ("spec.accept_if.max_failed", pb.AcceptIf(max_failed=-1)),
        ("spec.accept_if.max_lost", pb.AcceptIf(max_lost=-1)),
        ("spec.accept_if.max_anchor_kl", pb.AcceptIf(max_anchor_kl=0)),
    ],
)
def test_a_wrong_condition_is_named(field: str, accept: pb.AcceptIf) -> None:
    with pytest.raises(InvalidArgument) as error:
        read_accept_if(accept)
    assert [violation.field for violation in error.value.violations] == [field]

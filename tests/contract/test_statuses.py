"""Every domain error survives the way over the wire; every foreign status becomes one."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.errors import (
    ERROR_OF_CODE,
    ApolloError,
    FieldViolation,
    InvalidArgument,
    NotFound,
    Quota,
    Resource,
    Unknown,
)
from apollo_grpc.statuses import (
    DETAILS_KEY,
    DOMAIN,
    MAX_STATUS_BYTES,
    abort_arguments,
    from_rpc_error,
    from_status,
    to_status,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
REASONS = st.from_regex(r"[A-Z][A-Z_]{0,20}", fullmatch=True)
METADATA = st.dictionaries(TEXT, TEXT, max_size=3)
VIOLATIONS = st.lists(st.builds(FieldViolation, TEXT, TEXT), max_size=4)
KINDS = st.sampled_from(["run", "snapshot", "operation"])
RESOURCES = st.none() | st.builds(Resource, KINDS, TEXT)
QUOTAS = st.none() | st.builds(Quota, st.sampled_from(["streams", "queued_runs"]), TEXT)


@st.composite
def errors(draw) -> ApolloError:
    kind = draw(st.sampled_from(sorted(ERROR_OF_CODE.values(), key=lambda e: e.__name__)))
    named = {"reason": draw(st.just("") | REASONS), "metadata": draw(METADATA)}
    named |= {"resource": draw(RESOURCES), "quota": draw(QUOTAS)}
    if kind is InvalidArgument:
        named["violations"] = draw(VIOLATIONS)
    else:
        named["retry_seconds"] = draw(st.sampled_from([0.0, 0.25, 1.0, 90.0]))
    return kind(draw(TEXT), **named)


def facts(error: ApolloError) -> tuple[object, ...]:
    said = (error.message, error.reason, error.metadata, error.violations, error.retry_seconds)
    return type(error), *said, error.resource, error.quota


class FailedCall(grpc.RpcError):
    """A failed call as grpc raises it: code, text and trailers."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailers=()):
        self._code, self._details, self._trailers = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self):
        return self._trailers


@settings(deadline=None, max_examples=150, derandomize=True)
@given(errors())
def test_an_error_is_the_same_after_its_status_was_serialized(error):
    wire = to_status(error).SerializeToString()
    assert facts(from_status(status_pb2.Status.FromString(wire))) == facts(error)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(errors())
def test_a_status_carries_exactly_one_error_info_of_our_domain(error):
    status = to_status(error)
    kept = [d for d in status.details if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    info = error_details_pb2.ErrorInfo()
    kept[0].Unpack(info)
    assert len(kept) == 1
    assert (info.domain, info.reason) == (DOMAIN, error.reason)
    assert info.reason


@settings(deadline=None, max_examples=50, derandomize=True)
@given(errors())
def test_a_bad_request_is_there_exactly_where_fields_are_wrong(error):
    kept = [d for d in to_status(error).details if d.Is(error_details_pb2.BadRequest.DESCRIPTOR)]
    assert len(kept) == bool(error.violations)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(errors())
def test_a_limit_and_a_thing_are_told_in_googles_words(error):
    for detail in to_status(error).details:
        quota, resource = error_details_pb2.QuotaFailure(), error_details_pb2.ResourceInfo()
        if detail.Unpack(quota):
            (limit,) = quota.violations
            assert error.quota == Quota(limit.subject, limit.description)
        if detail.Unpack(resource):
            assert error.resource == Resource(resource.resource_type, resource.resource_name)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(errors())
def test_the_client_reads_the_error_out_of_the_trailers(error):
    trailers = (("other", "x"), (DETAILS_KEY, to_status(error).SerializeToString()))
    assert facts(from_rpc_error(FailedCall(error.code, "", trailers))) == facts(error)


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
def test_every_code_of_grpc_has_its_own_error(code):
    assert ERROR_OF_CODE[code].code is code


@pytest.mark.parametrize("trailers", [(), None, (("other", "x"),)])
def test_a_plain_status_keeps_its_code_and_text(trailers):
    error = from_rpc_error(FailedCall(grpc.StatusCode.NOT_FOUND, "no such method", trailers))
    assert facts(error) == facts(NotFound("no such method"))


def test_an_error_that_is_no_status_is_unknown():
    error = from_rpc_error(grpc.RpcError("the wire broke"))
    assert facts(error) == facts(Unknown("the wire broke"))


def test_a_status_of_a_code_that_grpc_does_not_know_is_unknown():
    assert facts(from_status(status_pb2.Status(code=999, message="?"))) == facts(Unknown("?"))


def test_details_that_cannot_be_read_leave_the_code_and_text():
    garbled = status_pb2.Status(code=5, message="?")
    garbled.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    for trailer in (b"\xff\xff", garbled.SerializeToString()):
        failed = FailedCall(grpc.StatusCode.NOT_FOUND, "gone", ((DETAILS_KEY, trailer),))
        assert facts(from_rpc_error(failed)) == facts(NotFound("gone"))


def test_details_of_other_programs_are_left_alone():
    status = to_status(NotFound("gone", reason="RUN_UNKNOWN"))
    help_ = error_details_pb2.Help()
    help_.links.add(url="https://example.org")
    status.details.add().Pack(help_)
    assert facts(from_status(status)) == facts(NotFound("gone", reason="RUN_UNKNOWN"))


def test_the_error_of_one_field_names_it_in_the_message_and_the_violation():
    error = InvalidArgument.at("spec.samples[3].tokens", "is empty")
    assert error.message == "spec.samples[3].tokens: is empty"
    assert error.violations == (FieldViolation("spec.samples[3].tokens", "is empty"),)


@pytest.mark.parametrize("kind", [NotFound, InvalidArgument])
def test_an_error_of_long_texts_is_short_enough_to_be_received_and_keeps_all_details(kind):
    long = "\u00e9" * 5000
    error = kind(long, resource=Resource("run", long), quota=Quota("samples", long))
    code, message, details = abort_arguments(error)
    assert len(details[0][1]) <= MAX_STATUS_BYTES
    received = from_rpc_error(FailedCall(code, message, details))
    assert type(received) is kind
    assert received.resource.kind == "run" and received.quota.subject == "samples"
    for text in (received.message, received.resource.name, received.quota.description):
        assert long.startswith(text.removesuffix(" ...")) and text.endswith("\u00e9 ...")

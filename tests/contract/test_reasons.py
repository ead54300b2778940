"""The catalogue of reasons has every word that a training server tells, and no other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from apollo_client.resume import STOPPING, UNREACHABLE
from apollo_grpc.errors import ERROR_OF_CODE
from apollo_grpc.v1 import reason_pb2 as pb
from tests.reasons_raised import NO_CODE, Source, Told

ROOT = Path(__file__).parents[2]
SERVER = [ROOT / "apollo_grpc", ROOT / "server"]
# Of a command or a server that does not start, or of vLLM's log; no caller is told them.
NOT_TOLD = {
    "ADDRESS_TAKEN",
    "FAILED_PRECONDITION",
    "LEDGER_DAMAGED",
    "LEDGER_NEWER",
    "LEDGER_TAKEN",
    "SIDECAR_TAKEN",
    "SOCKET_PATH_TOO_LONG",
    "SOCKET_PATH_UNUSABLE",
    "SOCKET_TAKEN",
    "STATE_FOLDER_NOT_PRIVATE",
    "STATE_FOLDER_UNUSABLE",
    "TLS_FILE_UNREADABLE",
    "TOKEN_FILE_NOT_PRIVATE",
    "TOKEN_FILE_UNUSABLE",
    # Server reflection has errors of its own, without a reason.
    "SYMBOL_NOT_FOUND",
}


def catalogue() -> Iterator[tuple[str, pb.ReasonInfo]]:
    for value in pb.Reason.DESCRIPTOR.values:
        if value.number:
            info = value.GetOptions().Extensions[pb.reason_info]
            yield value.name.removeprefix("REASON_"), info


CATALOGUE = dict(catalogue())


@pytest.fixture(scope="module")
def told() -> dict[str, list[Told]]:
    """What the server's source tells, by reason."""
    found = defaultdict(list)
    for each in Source(*SERVER).told():
        found[each.reason].append(each)
    return found


def test_every_reason_of_the_source_is_in_the_catalogue_and_is_told(told):
    missing = [places[0] for reason, places in told.items() if reason not in CATALOGUE]
    assert [each for each in missing if each.reason not in NOT_TOLD] == []
    assert CATALOGUE.keys() - told.keys() == set()
    assert NOT_TOLD - told.keys() == set(), "these are told nowhere"
    assert NOT_TOLD & CATALOGUE.keys() == set()


def test_a_reason_has_the_codes_of_the_errors_that_tell_it(told):
    codes = {reason: {each.code for each in told[reason]} - {NO_CODE} for reason in CATALOGUE}
    assert codes == {reason: set(info.codes) for reason, info in CATALOGUE.items()}


def test_the_words_of_the_client_and_of_its_commands_are_others():
    """One word means one thing; but both look at samples, and name a code if they know no more."""
    told = list(Source(ROOT / "client").told())
    fake = {each.reason for each in told if "apollo_client/testing/" in each.place}
    own = {each.reason for each in told if "apollo_client/testing/" not in each.place}
    both = {error.default_reason for error in ERROR_OF_CODE.values()} | {"SAMPLE_INVALID"}
    assert own & CATALOGUE.keys() - both == set()
    # The server of users' own tests says what the real one says.
    assert fake - both - {"CANCELLED"} <= CATALOGUE.keys() and fake & CATALOGUE.keys()


def test_what_to_do_is_one_sentence_and_the_codes_are_grpcs():
    for reason, info in CATALOGUE.items():
        assert info.action.endswith(".") and "\n" not in info.action, reason
        assert all(grpc.StatusCode[code] in ERROR_OF_CODE for code in info.codes), reason


def test_what_the_server_or_the_client_has_sent_again_may_be(told):
    again = {reason for reason, places in told.items() if any(each.again for each in places)}
    assert "TOO_MANY_STREAMS" in again
    assert {reason for reason in again | {STOPPING} if not CATALOGUE[reason].retryable} == set()
    assert UNREACHABLE not in CATALOGUE, "the client's own word for a call that no server answered"


def test_what_no_state_of_the_server_mends_is_not_sent_again():
    hopeless = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "DATA_LOSS"}
    hopeless |= {"UNAUTHENTICATED", "PERMISSION_DENIED"}
    again = {reason for reason, info in CATALOGUE.items() if info.retryable}
    assert {reason for reason in again if hopeless & {*CATALOGUE[reason].codes}} <= {
        "RESTORE_FAILED"
    }


WRITTEN = """
class Own(NotFound):
    default_reason = "OF_A_CLASS"

def _refusal(message, reason):
    return DataLoss(message, reason=reason)

class Limit:
    def __init__(self, *, what="streams"):
        self._what = what

    def refuse(self):
        raise ResourceExhausted("m", reason=f"TOO_MANY_{self._what.upper()}", retry_seconds=1.0)

def tell(warn, gone, known):
    Limit(), Limit(what="calls"), Own("m"), Aborted("m")
    InvalidArgument.at("field", "m", reason="OF_A_FIELD")
    Unavailable("m", reason="ONE" if gone else "OTHER")
    NotFound(known.message, reason=known.reason)
    pb.Notice(reason="OF_A_NOTICE")
    raise _refusal("m", "OF_A_FUNCTION")
"""
# Of such a one, all codes of its module are meant.
KEPT = """
why, reason = "m", "OF_A_VARIABLE"

def tell():
    raise FailedPrecondition(why, reason=reason)
"""


def test_reasons_are_found_however_they_are_written(tmp_path):
    (tmp_path / "written.py").write_text(WRITTEN)
    (tmp_path / "kept.py").write_text(KEPT)
    told = list(Source(tmp_path).told())
    assert {(each.reason, each.code) for each in told} == {
        ("OF_A_CLASS", "NOT_FOUND"),
        ("OF_A_FUNCTION", "DATA_LOSS"),
        ("TOO_MANY_STREAMS", "RESOURCE_EXHAUSTED"),
        ("TOO_MANY_CALLS", "RESOURCE_EXHAUSTED"),
        ("ABORTED", "ABORTED"),
        ("OF_A_FIELD", "INVALID_ARGUMENT"),
        ("ONE", "UNAVAILABLE"),
        ("OTHER", "UNAVAILABLE"),
        ("OF_A_NOTICE", NO_CODE),
        ("OF_A_VARIABLE", "FAILED_PRECONDITION"),
    }
    assert {each.reason for each in told if each.again} == {"TOO_MANY_STREAMS", "TOO_MANY_CALLS"}

"""Each RPC has a scope, in the table and on the page; callers with a smaller one are refused."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import apollo_grpc.token_check as token_check_module
from apollo_grpc.errors import PermissionDenied, Unauthenticated
from apollo_grpc.scopes import SCOPES, WORDS, Scope, scope_of
from apollo_grpc.token_check import TokenCheck
from apollo_grpc.tokens import Token, Tokens, digest_of
from apollo_grpc.v1 import checkpoint_pb2, dataset_pb2, status_pb2, training_pb2

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
METHODS = {
    f"/{service.full_name}/{method.name}"
    for module in (training_pb2, checkpoint_pb2, dataset_pb2, status_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
TRAIN, READ = "/apollo.v1.TrainingService/Train", "/apollo.v1.StatusService/GetStatus"


def test_each_rpc_of_the_contract_has_a_scope_and_no_other_has() -> None:
    assert {method for method in SCOPES if method.startswith("/apollo.v1.")} == METHODS


def test_the_page_has_the_same_scopes() -> None:
    told = {}
    for line in PAGE.read_text().splitlines():
        if row := re.match(r"\| `(read|train|admin)` \| (\w+) \| (.*) \|$", line):
            for name in re.findall(r"`(\w+)`", row[3]):
                told[f"/apollo.v1.{row[2]}/{name}"] = WORDS[row[1]]
    assert told == {method: SCOPES[method] for method in METHODS}


def test_what_the_table_lacks_needs_all() -> None:
    assert scope_of("/apollo.v1.TrainingService/Unheard") is Scope.ADMIN


def caller(token: str, peer: str = "ipv4:10.0.0.1:7"):
    sent = (("authorization", f"Bearer {token}"),)
    return SimpleNamespace(peer=lambda: peer, invocation_metadata=lambda: sent)


def check_of(scope: Scope, days: int | None = None) -> TokenCheck:
    expires = None
    if days is not None:
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    return TokenCheck(Tokens([Token("mine", scope, digest_of("secret"), expires)]))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("scope", Scope)
def test_a_scope_includes_those_below_it_and_no_more(method: str, scope: Scope) -> None:
    if scope_of(method) <= scope:
        check_of(scope)(caller("secret"), method)
        return
    with pytest.raises(PermissionDenied) as refused:
        check_of(scope)(caller("secret"), method)
    needed = scope_of(method).word
    assert (refused.value.reason, refused.value.metadata) == ("SCOPE_MISSING", {"scope": needed})
    assert f"--scope {needed}" in refused.value.message
    assert "secret" not in refused.value.message


def test_an_expired_token_is_told_to_have_expired() -> None:
    check_of(Scope.READ, days=1)(caller("secret"), READ)
    with pytest.raises(Unauthenticated, match="'mine' expired at") as refused:
        check_of(Scope.READ, days=-1)(caller("secret"), READ)
    assert refused.value.reason == "TOKEN_EXPIRED"


def test_callers_on_a_unix_socket_may_do_all() -> None:
    check_of(Scope.READ)(caller("none", "unix:"), "/apollo.v1.CheckpointService/Export")


def test_many_guesses_are_a_line_of_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, clock = check_of(Scope.READ), SimpleNamespace(monotonic=lambda: time[0])
    time = [0.0]
    monkeypatch.setattr(token_check_module, "time", clock)
    for guess in range(1000):
        time[0] += 0.01
        with pytest.raises(Unauthenticated):
            check(caller(f"guess-{guess}"), TRAIN)
    assert len(caplog.records) == 1
    time[0] += token_check_module.LOG_SECONDS
    with pytest.raises(Unauthenticated):
        check(caller("the last"), TRAIN)
    assert "1000 calls without a known token; the last from ipv4:10.0.0.1:7" in caplog.text
    assert "guess" not in caplog.text

"""The product's own server on TCP: a token, certificates, both, and what is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import apollo_trainer.main as server_module
from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError, Unauthenticated, Unavailable
from tests.certificates import Authority
from tests.services.conftest import ServerThread

Ask = Callable[..., str]


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def serve(
    state_dir: Path,
    sidecar_address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Any:
    """Starts the server on a port of 127.0.0.1; returns the address that its log tells."""
    started: list[ServerThread] = []

    def start(**settings: Any) -> str:
        given = {"state_dir": state_dir, "sidecar": sidecar_address} | settings
        with caplog.at_level(logging.INFO):
            made = server_module.Settings(address="127.0.0.1:0", **given)
            started.append(ServerThread(made, monkeypatch, serves=lambda: told(caplog.text)))
        return told(caplog.text)

    yield start
    for server in started:
        server.stop()


def told(log: str) -> str:
    found = re.search(r"listens on (127\.0\.0\.1:[1-9]\d*)", log)
    return found[1] if found else ""


def ask(address: str, **how: Any) -> str:
    """The server's version; the name of the error where it refuses."""
    try:
        with ApolloClient(address, **how) as client:
            return client.status().server_version
    except ApolloError as error:
        return type(error).__name__


REFUSED, UNHEARD = Unauthenticated.__name__, Unavailable.__name__


def test_a_token_is_needed_and_enough(serve: Any, state_dir: Path) -> None:
    address = serve()
    token = (state_dir / "token").read_text()
    assert ask(address, token=token)[0].isdigit()
    assert ask(address, token="another") == REFUSED


def test_with_tls_a_token_is_needed_as_well(serve: Any, state_dir: Path, ours: Authority) -> None:
    certificate, key = ours.issue("server")
    address = serve(tls_certificate=certificate, tls_key=key)
    token = (state_dir / "token").read_text()
    assert ask(address, token=token, ca=ours.ca)[0].isdigit()
    assert ask(address, token="another", ca=ours.ca) == REFUSED
    assert ask(address, token=token) == UNHEARD


def test_a_certificate_alone_is_enough(serve: Any, state_dir: Path, ours: Authority) -> None:
    certificate, key = ours.issue("server")
    address = serve(tls_certificate=certificate, tls_key=key, tls_client_ca=ours.ca)
    assert not (state_dir / "token").exists()
    certificate, key = ours.issue("client")
    assert ask(address, ca=ours.ca, certificate=certificate, key=key)[0].isdigit()
    assert ask(address, ca=ours.ca) == UNHEARD


def test_where_both_are_asked_for_neither_is_enough(
    serve: Any, tmp_path: Path, ours: Authority
) -> None:
    certificate, key = ours.issue("server")
    (token := tmp_path / "token").write_text("from-outside\n")
    tls = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": ours.ca}
    address = serve(token_file=token, **tls)
    certificate, key = ours.issue("client")
    mine = {"ca": ours.ca, "certificate": certificate, "key": key}
    assert ask(address, **mine) == REFUSED
    assert ask(address, token="from-outside", ca=ours.ca) == UNHEARD
    assert ask(address, token="from-outside", **mine)[0].isdigit()


def test_the_python_client_takes_all_of_it_from_the_environment(
    serve: Any, tmp_path: Path, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = ours.issue("server")
    (token := tmp_path / "token").write_text("from-outside\n")
    tls = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": ours.ca}
    address = serve(token_file=token, **tls)
    certificate, key = ours.issue("client")
    files = {"TOKEN_FILE": token, "CA": ours.ca, "CERTIFICATE": certificate, "KEY": key}
    for name, value in {"ADDRESS": address, **files}.items():
        monkeypatch.setenv(f"APOLLO_{name}", str(value))
    assert ask("")[0].isdigit()
    monkeypatch.delenv("APOLLO_TOKEN_FILE")
    monkeypatch.setenv("APOLLO_TOKEN", "from-outside\n")
    assert ask("")[0].isdigit()


def words_of(address: str, **how: Any) -> str:
    with ApolloClient(address, **how) as client, pytest.raises(Unavailable) as unheard:
        client.status()
    return unheard.value.message


def test_what_is_wrong_with_tls_is_told_with_what_to_do(
    serve: Any, tmp_path: Path, ours: Authority
) -> None:
    theirs = Authority(tmp_path, "theirs")
    certificate, key = ours.issue("server")
    address = serve(tls_certificate=certificate, tls_key=key, tls_client_ca=ours.ca)
    assert "name its authority with --ca" in words_of(address, ca=theirs.ca)
    certificate, key = theirs.issue("client")
    given = {"certificate": certificate, "key": key}
    for how in ({}, {"ca": ours.ca}, {"ca": ours.ca} | given):
        assert "asks for --certificate and --key" in words_of(address, **how)


def test_a_server_without_tls_is_told_to_a_caller_with_it(serve: Any, ours: Authority) -> None:
    assert "speaks no TLS" in words_of(serve(), ca=ours.ca)

"""What is an address, what is none, and what a user is told then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_grpc.addresses import require_address, target
from apollo_grpc.errors import ApolloError, FailedPrecondition, InvalidArgument

GOOD = [
    "localhost:50051",
    "127.0.0.1:1",
    "[::1]:65535",
    "dns:///host.example.org:5",
    "my_service:50051",
    "a-b.c.:80",
]


@pytest.mark.parametrize("address", GOOD)
def test_an_address_is_taken_as_it_is(address):
    assert require_address(address) == address
    assert require_address(f" {address}\n") == address
    assert target(address) == address


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://localhost:1", "without the scheme"),
        ("grpc://localhost:1", "without the scheme"),
        ("unix-abstract:a", "is no address"),
        ("localhost", "write HOST:PORT or unix:PATH"),
        ("localhost:", "is no address"),
        ("localhost:http", "is no address"),
        ("localhost:65536", "names no port between 1 and 65535"),
        ("localhost:0", "names no port between 1 and 65535"),
        ("::1:50051", "in brackets"),
        ("[::1:50051", "is no address"),
        ("[localhost]:1", "is no address"),
        ("/run/apollo.sock", "write unix:/run/apollo.sock"),
        ("a b:1", "is no address"),
        ("ü:1", "is no address"),
        ("", "is no address"),
        ("unix:", "names no socket"),
    ],
)
def test_what_is_none_is_told_with_what_to_write(address, words):
    with pytest.raises(InvalidArgument) as refused:
        require_address(address, "--address")
    assert words in refused.value.message
    assert refused.value.violations[0].field == "--address"


def test_a_server_may_let_the_system_pick_its_port():
    assert require_address("localhost:0", listens=True) == "localhost:0"


@pytest.mark.parametrize("address", ["unix:/" + "x" * 107, "unix:/a,b"])
def test_a_socket_by_hand_that_cannot_be_is_refused(address):
    with pytest.raises(FailedPrecondition, match="socket path"):
        require_address(address)


def test_a_relative_socket_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert require_address("unix:s.sock") == f"unix:{tmp_path}/s.sock"


def test_every_byte_of_a_path_is_its_own_in_what_grpc_reads():
    assert target("unix:/a%20 #?\udcff") == "unix:/a%2520%20%23%3F%FF"


@given(st.text(max_size=40) | st.from_regex(r"(unix:|dns:///)?[\w.\[\]:%/-]*:\d*", fullmatch=True))
def test_any_text_is_an_address_or_is_refused(address):
    try:
        checked = require_address(address)
    except ApolloError as error:
        assert error.message
    else:
        assert require_address(checked) == checked

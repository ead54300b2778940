"""A fake server, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from apollo_client import ApolloClient
from apollo_client.testing import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        yield made


@pytest.fixture
def client(server: FakeServer) -> Iterator[ApolloClient]:
    with ApolloClient(server.address) as made:
        yield made

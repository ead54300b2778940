"""For pytest: `pytest_plugins = ["apollo_client.testing.fixture"]` in a conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from apollo_client.testing.server import FakeServer


@pytest.fixture
def apollo_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A fake server for one test; clients without an address find it by $APOLLO_ADDRESS."""
    with FakeServer() as server:
        monkeypatch.setenv("APOLLO_ADDRESS", server.address)
        yield server

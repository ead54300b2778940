"""The fake server keeps what a training server promises, as `apollo-conformance` tries it."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_client import ApolloClient
from apollo_client.conformance.command import SUBJECTS
from apollo_client.conformance.promises import PROMISES
from apollo_client.testing import FakeServer
from tests.client.conformance.running import conformance, verdicts

# There is no reflection without its package, which the base install has not.
NOT_APPLICABLE = {"reflection_lists_the_services": "the server does not have it"}


def test_each_promise_is_kept(server: FakeServer, client: ApolloClient, tmp_path: Path) -> None:
    # Then there are versions before that of the weights.
    list(client.train([("One", " two.")]))
    done = conformance(server.address, "--json", "--checkpoints", "--folder", str(tmp_path))
    found = verdicts(done)
    assert {n: v["seen"] for n, v in found.items() if v["verdict"] != "passed"} == NOT_APPLICABLE
    assert found.keys() == {promise.name for promise in PROMISES}
    assert done.returncode == 0


@pytest.mark.parametrize("subject", ["runs", "watching"])
def test_a_server_that_was_restarted_keeps_them(
    subject: str, server: FakeServer, client: ApolloClient
) -> None:
    assert subject in {each.__name__.rpartition(".")[2] for each in SUBJECTS}
    list(client.train([("One", " two.")]))
    server.restart()
    assert conformance(server.address, "--only", subject).returncode == 0

"""`apollo checkpoint operations`, `cancel`, and what is left to itself."""

from __future__ import annotations

import json

import pytest

from apollo_client import ApolloClient
from tests.command_line import apollo


def test_operations_are_listed_and_cancelled_by_either_id(server):
    environment = {"APOLLO_ADDRESS": server}

    def checkpoint(*arguments: str):
        return apollo("checkpoint", *arguments, env=environment)

    assert checkpoint("sync", "--request-id", "by either").returncode == 0
    refused = checkpoint("create", "--expect", "99999")
    assert (refused.returncode, "WEIGHT_VERSION_CHANGED" in refused.stderr) == (1, True)
    listed = checkpoint("operations", "--limit", "2", "--json").stdout.splitlines()
    failed, synced = map(json.loads, listed)
    assert failed["failure"]["reason"] == "WEIGHT_VERSION_CHANGED"
    lines = checkpoint("operations", "--limit", "2").stdout.splitlines()
    assert lines[0].startswith(failed["operation_id"])
    assert lines[0].endswith("failed     create snapshot  WEIGHT_VERSION_CHANGED")
    assert lines[1].startswith(synced["operation_id"])
    assert lines[1].endswith("succeeded  sync  request id by either")
    only = checkpoint("operations", "--state", "failed", "--limit", "1").stdout
    assert only == f"{lines[0]}\n"
    for operation in ("by either", synced["operation_id"]):
        done = checkpoint("cancel", operation)
        assert (done.returncode, done.stdout) == (1, f"{operation}: too late\n")
    assert checkpoint("operations", "--state", "ended").returncode == 2


@pytest.mark.parametrize(
    "words", ["sync", *(f"checkpoint {name}" for name in ("sync", "verify", "create", "undo"))]
)
def test_ctrl_c_leaves_an_operation_going_and_says_how_to_stop_it(server, monkeypatch, words):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ApolloClient, "_result", interrupt)
    left = apollo(*words.split(), env={"APOLLO_ADDRESS": server})
    assert left.returncode == 130
    assert "goes on" in left.stderr and "apollo checkpoint cancel ID" in left.stderr

"""`apollo info`: what a server and its model can do."""

from __future__ import annotations

import json

from apollo_client.command.display import info_lines
from apollo_grpc.v1 import status_pb2
from tests.command_line import apollo


def test_the_model_and_the_limits_are_told_to_people_and_to_programs(server):
    told = apollo("--address", server, "info")
    assert told.returncode == 0
    for words in ("Qwen3ForCausalLM", "at most 10,000 samples and 64 MiB", "pause_step", "SHA-256"):
        assert words in told.stdout
    found = json.loads(apollo("--address", server, "info", "--json").stdout)
    assert found["model"]["vocabulary"] == 259
    assert found["limits"]["message_bytes"] == str(64 * 2**20)


def test_without_an_engine_the_line_of_the_model_says_where_to_look():
    (line,) = [
        each for each in info_lines(status_pb2.GetServerInfoResponse()) if each.startswith("model")
    ]
    assert "apollo status" in line

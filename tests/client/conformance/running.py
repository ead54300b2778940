"""The `apollo-conformance` command in this process: what it says and how it ends."""

from __future__ import annotations

import json
from subprocess import CompletedProcess
from typing import Any

from typer.testing import CliRunner

from apollo_client.conformance.command import app


def conformance(address: str, *arguments: str) -> CompletedProcess[str]:
    """Runs the command in this process; what it does not catch is raised."""
    asked = ["--address", address, *arguments]
    done = CliRunner().invoke(app, asked, prog_name="apollo-conformance")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return CompletedProcess(asked, done.exit_code, done.stdout, done.stderr)


def verdicts(done: CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line for line in lines}

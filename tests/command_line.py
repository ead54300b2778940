"""The `apollo` command in this process: what it says and how it ends, without another Python."""

from __future__ import annotations

from collections.abc import Mapping
from subprocess import CompletedProcess

from typer.testing import CliRunner

from apollo_client.command.app import app


def apollo(
    *arguments: str, env: Mapping[str, str] | None = None, input: str | None = None
) -> CompletedProcess[str]:
    """Runs it to its end, with more environment variables. What it does not catch is raised."""
    done = CliRunner().invoke(app, list(arguments), env=env, input=input, prog_name="apollo")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

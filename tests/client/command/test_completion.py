"""Shells complete the command once they have what `apollo completion` prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import apollo
from tests.waiting import HANG

BIN = Path(sys.executable).parent


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_reads_what_is_printed(shell: str) -> None:
    script = apollo("completion", shell)
    assert (script.returncode, "_APOLLO_COMPLETE" in script.stdout) == (0, True)
    if found := shutil.which(shell):
        read = subprocess.run([found, "-n"], input=script.stdout, text=True, timeout=HANG)
        assert read.returncode == 0


TYPED = {
    "che": "checkpoint",
    "checkpoint re": "restore",
    "wait --la": "--last",
    "completion zs": "zsh",
}


def test_bash_completes_commands_and_options() -> None:
    lines = ["source <(apollo completion bash)"]
    for typed in TYPED:
        words = typed.split()
        lines.append(f"COMP_WORDS=(apollo {typed}); COMP_CWORD={len(words)}")
        lines.append('_apollo_completion apollo; echo "${COMPREPLY[*]}"')
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = ["bash", "-c", "\n".join(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.stdout.splitlines() == [*TYPED.values()], done.stderr


def test_the_help_says_so() -> None:
    assert "apollo completion SHELL" in " ".join(apollo("--help").stdout.split())
    assert apollo("completion", "csh").returncode == 2

"""`apollo completion`: what makes a shell complete the command."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Any

import typer
import typer.completion

_VARIABLE = "_APOLLO_COMPLETE"
# It says of none of these that others may import them from it.
_typer: Any = typer.completion


class Shell(StrEnum):
    """Those that are known."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def command(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print what makes SHELL complete commands and options.

    For bash put 'source <(apollo completion bash)' into ~/.bashrc; for zsh 'source <(apollo
    completion zsh)' into ~/.zshrc, after compinit; for fish write the output to
    ~/.config/fish/completions/apollo.fish.
    """
    script = _typer.get_completion_script(
        prog_name="apollo", complete_var=_VARIABLE, shell=shell.value
    )
    print(script)


def answer_shells() -> None:
    """Where a shell asks what completes a line, typer answers it when the command is called."""
    if _VARIABLE in os.environ:
        _typer.completion_init()

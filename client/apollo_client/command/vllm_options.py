"""What the user told vLLM, read as vLLM reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_WORKERS = re.compile(r"(?:--tensor-parallel-size|-tp)[=: ]+(\d+)")
_OPTION = re.compile(r"--[\w-]+|-O|-\w+")
_CONFIG = re.compile(r"--config[= ](\S+)")


def told(arguments: Sequence[str], *options: str) -> bool:
    """Whether vLLM is told one of these options, by an argument or in its `--config` file."""
    said = [argument.replace("_", "-") for argument in arguments if argument.startswith("-")]
    said += [f"--{line}" for line in _config_lines(arguments)]
    return any(match[0] in options for each in said if (match := _OPTION.match(each)))


def workers(arguments: Sequence[str]) -> int:
    """How many workers vLLM is told to divide each layer over."""
    said = " ".join([*arguments, *(f"--{line}" for line in _config_lines(arguments))])
    found = _WORKERS.search(said.replace("_", "-"))
    return int(found[1]) if found else 1


def _config_lines(arguments: Sequence[str]) -> list[str]:
    joined = " ".join(arguments)
    if not (named := re.search(r"--config[= ](\S+)", joined)):
        return []
    try:
        return Path(named[1]).read_text().replace("_", "-").splitlines()
    except (OSError, ValueError):
        return []  # vLLM says what is wrong with it.

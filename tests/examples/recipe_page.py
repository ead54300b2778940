"""docs/recipes.md: the commands that it shows, and what it says that they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import HANG

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes.md"
BIN = Path(sys.executable).parent
_BLOCK = re.compile(r"```console\n\$ ([^\n]*)\n(.*?)```", re.DOTALL)
# The beginning of a run's id, or a number, and the room that it takes.
_NUMBER = re.compile(r" *(?:\b[0-9a-f]{8}\b|\d[\d.,e-]*)")


@dataclass(frozen=True)
class Shown:
    """A command of the page, and the lines below it; `...` stands for any."""

    command: str
    printed: list[str]


def shown(name: str) -> Shown:
    """The one whose command has a name in it."""
    (found,) = [block for block in _BLOCK.findall(PAGE.read_text()) if name in block[0]]
    return Shown(found[0], found[1].splitlines())


def environment(address: str) -> dict[str, str]:
    """In which a recipe finds our Python, its tools and the server."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "APOLLO_ADDRESS": address}


def run(command: str, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of the page from the top of the checkout; what it writes goes to a folder."""
    words = [str(ROOT / word) if (ROOT / word).exists() else word for word in shlex.split(command)]
    return subprocess.run(
        words,
        env=environment(address),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG,
    )


def is_as_shown(printed: str, lines: list[str]) -> bool:
    """Whether what was printed is what the page says, but for its numbers."""
    patterns = [
        r"(?:.*\n)*" if line.strip() == "..." else re.escape(masked(line)) + r"\s*\n"
        for line in lines
    ]
    return re.fullmatch("".join(patterns), masked(printed)) is not None


def masked(text: str) -> str:
    """The same, with `#` for each number."""
    return _NUMBER.sub("#", text)

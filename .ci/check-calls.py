"""Fails when the blocking calls are not what the asyncio ones generate; with --write, writes them.

One text says both clients' calls, so that neither gets a change that the other lacks.
"""

import io
import re
import subprocess
import sys
import tokenize
from itertools import pairwise
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[1] / "client/apollo_client"
PREFIX = "aio_"
KINDS = ("", "sample_", "dataset_", "checkpoint_")
SOURCES = [CLIENT / f"{PREFIX}{kind}calls.py" for kind in KINDS]
HEADER = "# Generated from {} by `make protos`: change that file, not this one.\n"


def target(source: Path) -> Path:
    """The blocking twin of a file."""
    return source.with_name(source.name.removeprefix(PREFIX))


def blocking(text: str, source: str) -> str:
    """The same code without `async` and `await`, and with the blocking names; texts stay."""
    lines = text.splitlines(keepends=True)
    tokens = pairwise(tokenize.generate_tokens(io.StringIO(text).readline))
    # From the last one: a change moves only what comes after it.
    for token, following in reversed(list(tokens)):
        if token.type != tokenize.NAME:
            continue
        (row, start), (_, end) = token.start, token.end
        name = re.sub(f"^(Async|{PREFIX})", "", token.string)
        if name in ("async", "await"):
            name, end = "", following.start[1]
        lines[row - 1] = lines[row - 1][:start] + name + lines[row - 1][end:]
    return "".join([HEADER.format(source), *lines[1:]])


def formatted(text: str, source: Path) -> str:
    """As ruff leaves it: a shorter name has another place among imports, and fills lines less."""
    for step in (["check", "--fix-only", "--select", "I"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *step, "--quiet", "--stdin-filename", str(source)]
        done = subprocess.run([*ruff, "-"], input=text, stdout=subprocess.PIPE, text=True)
        done.check_returncode()
        text = done.stdout
    return text


def main() -> None:
    """Compares the checked-in files, or with --write writes them."""
    for source in SOURCES:
        made = formatted(blocking(source.read_text(), source.name), source)
        twin = target(source)
        if sys.argv[1:] == ["--write"]:
            twin.write_text(made)
            continue
        told = ["diff", "-Nu", twin, "-"]
        if subprocess.run(told, input=made, text=True).returncode:
            sys.exit(f"check: {twin.name} is not what {source.name} generates; run 'make protos'")


if __name__ == "__main__":
    main()

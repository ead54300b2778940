"""Fails when calls.py is not what aio_calls.py generates; with --write, writes it instead.

One text says both clients' calls, so that neither gets a change that the other lacks.
"""

import io
import re
import subprocess
import sys
import tokenize
from itertools import pairwise
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "client/apollo_client/aio_calls.py"
TARGET = SOURCE.with_name("calls.py")
HEADER = "# Generated from aio_calls.py by `make protos`: change that file, not this one.\n"


def blocking(text: str) -> str:
    """The same code without `async` and `await`, and with the blocking names; texts stay."""
    lines = text.splitlines(keepends=True)
    tokens = pairwise(tokenize.generate_tokens(io.StringIO(text).readline))
    # From the last one: a change moves only what comes after it.
    for token, following in reversed(list(tokens)):
        if token.type != tokenize.NAME:
            continue
        (row, start), (_, end) = token.start, token.end
        name = re.sub("^(Async|aio_)", "", token.string)
        if name in ("async", "await"):
            name, end = "", following.start[1]
        lines[row - 1] = lines[row - 1][:start] + name + lines[row - 1][end:]
    return "".join([HEADER, *lines[1:]])


def formatted(text: str) -> str:
    """As ruff leaves it: a shorter name has another place among imports, and fills lines less."""
    for step in (["check", "--fix-only", "--select", "I"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *step, "--quiet", "--stdin-filename", str(SOURCE)]
        done = subprocess.run([*ruff, "-"], input=text, stdout=subprocess.PIPE, text=True)
        done.check_returncode()
        text = done.stdout
    return text


def main() -> None:
    """Compares the checked-in file, or with --write writes it."""
    made = formatted(blocking(SOURCE.read_text()))
    if sys.argv[1:] == ["--write"]:
        TARGET.write_text(made)
    elif subprocess.run(["diff", "-Nu", TARGET, "-"], input=made, text=True).returncode:
        sys.exit("check: calls.py is not what aio_calls.py generates; run 'make protos'")


if __name__ == "__main__":
    main()

"""Standard input, output and errors as a program finds them: closed, of ASCII alone, or full."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import Any

_SIZE = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)


def prepare_streams() -> None:
    """Opens those that are closed on nothing, and lets no character be too much for the others.

    The next file or socket would otherwise have the number of a closed one, and get what libraries
    write there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        _open_on_nothing(number)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for name in ("COLUMNS", "LINES"):
        # Of a terminal: rich takes more for a number than is one, fills any width, and none of 0.
        if not _SIZE.fullmatch(os.environ.get(name, "80")):
            del os.environ[name]
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="backslashreplace")


def _open_on_nothing(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        # The lowest free number, which is this one: those below are open by now.
        os.open(os.devnull, os.O_RDWR)
        with contextlib.suppress(OSError):
            os.set_inheritable(number, True)


def flush_output() -> OSError | None:
    """Writes what is left of standard output; returns why it cannot be.

    At the interpreter's end it would be tried again, and told as an exception that was ignored.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        nothing = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
        return error
    return None

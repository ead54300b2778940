"""Values that nobody means, for every option of a command, and streams to catch what it says."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from hypothesis import strategies as st

VALUES = (
    *("", " ", "0", "-1", "nan", "inf", "-inf", "1e400", "0x10", "1_0", "9" * 400, "2147483648"),
    *("9223372036854775808", "-9223372036854775809", "1e-400", "true", "null", "None", "[1", "{}"),
    *("\x01\x1b[31m\x07", "a\nb", "\t", "\udcff", "\ud800", "\u202e\u2028", "ü" * 300, "x" * 5000),
    *("-", "--", "--help", "-x", "a=b", "%s%n", "${HOME}", "`id`", "*", "~", "~nobody-here", ".."),
    *("unix:", "unix:a,b", "unix:" + "x" * 120, "unix:s.sock", "unix:/dev/full", "http://h:1"),
    *("localhost:0", "localhost:1", "127.0.0.1:65536", "::1:5", "[::1", "0.0.0.0:0", "h:", ":1"),
    *("/dev/null", "/proc/self/mem", "/proc/1/environ", "/", "missing", "folder", "empty", "text"),
    *("text/below", "/nowhere/file", "1800+200", "2x3+4", "1+1+1", "system"),
)
# Of random ones none is a path from the root: what a command makes stays in the test's folder.
RANDOM = st.text(st.characters(exclude_characters="\0"), max_size=12).filter(
    lambda text: not text.startswith("/") and ".." not in text
)
ANY = st.sampled_from(VALUES) | RANDOM


def as_arguments(text: str) -> str:
    """As the system passes it: what is no UTF-8 becomes lone surrogates, others there are none."""
    return os.fsdecode(text.encode("utf-8", "surrogatepass").replace(b"\0", b""))


def make_files(folder: Path) -> None:
    """The files that `VALUES` name, in a folder that the commands run in."""
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "text").write_text("two\nlines\n")


class Kept(io.BytesIO):
    """Is read once its text wrapper has gone."""

    def close(self) -> None:
        pass


class _Short(Kept):
    """A pipe whose reader leaves after some bytes."""

    def write(self, data: object) -> int:
        if self.tell() > 2000:
            raise BrokenPipeError
        return super().write(data)  # type: ignore[arg-type]


@contextmanager
def streams(encoding: str, environment: Mapping[str, str]) -> Iterator[tuple[Kept, Kept]]:
    """Standard streams of that encoding, an empty input, and more environment.

    Yields what goes to output, whose reader leaves after some bytes, and to errors.
    """
    out, errors = _Short(), Kept()
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO())),
        mock.patch.object(sys, "stdout", io.TextIOWrapper(out, encoding)),
        mock.patch.object(sys, "stderr", io.TextIOWrapper(errors, encoding, write_through=True)),
    ):
        yield out, errors

"""The server's log: lines of text or of JSON, each with the run, operation or incident it is about.

What callers send is never logged. An unexpected error's own text may quote it: of such an error a
line has its type and where it was raised.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from apollo_grpc.errors import printable

Format = Literal["text", "json"]
OURS = ("apollo_trainer", "apollo_grpc")
IDS = ("run_id", "operation_id", "incident")
_about: ContextVar[dict[str, str] | None] = ContextVar("about", default=None)


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """Lines of this thread or task, within the block, are about a run or an operation."""
    token = _about.set((_about.get() or {}) | ids)
    try:
        yield
    finally:
        _about.reset(token)


def begin(form: Format, level: str = "info") -> None:
    """Has every line from now on go to standard error, in this form. May be called again."""
    number = logging.getLevelNamesMapping()[level.upper()]
    # Of other libraries nobody wants every detail: some tell each instruction that they compile.
    end(max(number, logging.INFO), number)
    handler = _Handler()
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)


def end(level: int, ours: int = logging.NOTSET) -> None:
    """Takes back what `begin` did; the root logger has this level again, and our loggers theirs."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(handler)
    logging.captureWarnings(False)
    root.setLevel(level)
    for name in OURS:
        logging.getLogger(name).setLevel(ours)


class _Handler(logging.StreamHandler[Any]):
    def emit(self, record: logging.LogRecord) -> None:
        """Writes to standard error as it is then."""
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Names of files that are no UTF-8 are spelt out."""
        return printable(super().format(record))


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One or more lines."""
        # What another handler has made of the error, with its text, would be taken for it.
        record.exc_text = None
        try:
            return super().format(record)
        finally:
            record.exc_text = None

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Adds the ids that the message does not have."""
        line = super().formatMessage(record)
        added = [f"{name}={value}" for name, value in _ids(record).items() if value not in line]
        return f"{line} ({', '.join(added)})" if added else line

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Without what the error says."""
        return _frames(ei[1])


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line of one object; `time` is UTC, as of RFC 3339."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_ids(record),
        }
        if record.exc_info and record.exc_info[1]:
            line["error"] = _frames(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False)


def _ids(record: logging.LogRecord) -> dict[str, str]:
    """Of the line itself, given with `extra`, or else of what its thread or task is at."""
    found = {name: getattr(record, name, "") or (_about.get() or {}).get(name) for name in IDS}
    return {name: str(value) for name, value in found.items() if value}


def _frames(error: BaseException | None) -> str:
    """The traceback of an error and of those that it came from, without their texts."""
    lines, seen = list[str](), set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kind = type(error)
        stack = "".join(traceback.format_tb(error.__traceback__)).rstrip()
        lines.append(f"{kind.__module__}.{kind.__qualname__}, raised at:\n{stack}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nwhich came from ".join(lines)

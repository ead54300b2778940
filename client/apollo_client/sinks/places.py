"""What the sinks share: one writer a place, libraries that are asked for, words for what is not."""

from __future__ import annotations

import fcntl
from importlib import import_module
from typing import Any, BinaryIO

from apollo_grpc.errors import FailedPrecondition


def hold(file: BinaryIO, place: str) -> None:
    """Keeps others out until the file is closed. Raises FailedPrecondition where one is in."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FailedPrecondition(
            f"Another 'apollo watch' writes to {place}; nothing was written. End that one, or "
            "name another place.",
            reason="SINK_IN_USE",
        ) from None


def require_library(module: str, extra: str) -> Any:
    """A module of an extra. Raises FailedPrecondition with the words that install it."""
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise FailedPrecondition(
            f"{library} is not installed here ({error}); nothing was written. Run "
            f"'pip install apollo-grpc[{extra}]', or 'pip install {library}', and start again.",
            reason="SINK_LIBRARY_MISSING",
        ) from None


def not_ours(place: str, why: str) -> FailedPrecondition:
    """What is told of a place that holds something else than a sink left there."""
    return FailedPrecondition(
        f"{place} cannot be gone on with: {why}. It was left as it is; move it away, "
        "or name another place.",
        reason="SINK_NOT_RESUMABLE",
    )

"""How the command ends: its exit statuses, and errors in words on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from apollo_grpc.errors import ApolloError, DeadlineExceeded, InvalidArgument, Unavailable
from apollo_grpc.standard_streams import flush_output

# Also a run that failed, was cancelled, or was rejected by its probes.
REFUSED = 1
WRONG_INPUT = 2
UNREACHABLE = 3
INTERRUPTED = 130
MAX_SHOWN = 20


def exit_status(error: ApolloError) -> int:
    """2 for what the caller must mend, 3 for what may work later, 1 for the rest."""
    if isinstance(error, InvalidArgument):
        return WRONG_INPUT
    return UNREACHABLE if isinstance(error, Unavailable | DeadlineExceeded) else REFUSED


def fail(message: str, status: int) -> NoReturn:
    """Prints what went wrong and ends the command."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"apollo: {message}", style="red", markup=False
    )
    raise typer.Exit(status)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Ends the command with a message and a status instead of a traceback."""
    try:
        yield
    except ApolloError as error:
        fail(_describe(error), exit_status(error))
    except BrokenPipeError:
        # The reader of a pipe left, as `head` does.
        raise typer.Exit(REFUSED) from None
    except OSError as error:
        fail(f"the system refused: {error}", REFUSED)


def output_status() -> int:
    """Writes what is left of the output; 0, or `REFUSED` where nobody reads it or the disk is full.

    The second is told.
    """
    error = flush_output()
    if error and not isinstance(error, BrokenPipeError):
        print(f"apollo: the output was not written: {error.strerror}", file=sys.stderr)
    return REFUSED if error else 0


def _describe(error: ApolloError) -> str:
    lines = [f"{error.message} ({error.reason})"]
    if len(error.violations) > 1:
        lines += [f"  {v.field}: {v.description}" for v in error.violations[:MAX_SHOWN]]
    return "\n".join(lines)

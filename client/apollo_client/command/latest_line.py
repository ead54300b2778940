"""The latest news of what lasts: one line of a terminal, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from apollo_client.sample_values import shown
from apollo_grpc.v1 import checkpoint_pb2

T = TypeVar("T")
_SAMPLES_A_LINE = 1000


@contextmanager
def latest_line(first: str, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Shows `first`, and then each line that what it yields is called with.

    Args:
        console: stderr's where there is none, so that the output is a program's to read.
    """
    console = console or Console(stderr=True)
    with console.status(Text(first), spinner="line") as status:
        yield lambda line: status.update(Text(line))


def progress_line(progress: checkpoint_pb2.Operation.Progress) -> str:
    """How far an operation is."""
    done, total = progress.bytes_done, progress.bytes_total
    return f"{done:,} of {total:,} bytes  {shown(progress.current)}".rstrip()


def counted(samples: Iterable[T], show: Callable[[str], None]) -> Iterator[T]:
    """The same samples; says now and then how many there were."""
    for count, sample in enumerate(samples):
        if count % _SAMPLES_A_LINE == 0:
            show(f"{count:,} samples sent")
        yield sample

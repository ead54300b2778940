"""A CSV file with a row for each step."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from apollo_client.sinks.figures import STEP_FIGURES, step_figures
from apollo_client.sinks.places import hold, not_ours
from apollo_grpc.v1 import training_pb2

COLUMNS = ("run_id", "sequence", "time", "step", *STEP_FIGURES)


def _line(values: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


_HEADER = _line(COLUMNS)


class CsvSink:
    """Appends a row a step to a file, which may hold rows of other runs as well.

    The file itself says where to go on: behind the last whole row of the run. A row that a crash
    has cut off is taken out.

    Args:
        place: the file; it is made where there is none.

    Attributes:
        after: sequence of the last row of the run.
    """

    def __init__(self, place: str, run_id: str):
        path = Path(place)
        if path.exists() and not path.is_file():
            raise not_ours(place, "it is no file")
        # Unbuffered: a row is in the file, for all to read, when `write` returns.
        self._file = path.open("ab", buffering=0)
        hold(self._file, place)
        with path.open("rb") as written:
            try:
                self.after, end = _where_it_ended(written, run_id)
            except (ValueError, TypeError, csv.Error) as error:
                raise not_ours(place, f"it holds no such rows ({error})") from None
        self._file.truncate(end)
        if not end:
            self._append(_HEADER)

    def write(self, event: training_pb2.RunEvent) -> None:
        """Appends the row of a step; other events have none. Raises OSError."""
        if not event.HasField("step"):
            return
        found = step_figures(event.step)
        when = event.event_time.ToJsonString()
        numbers = [found.get(name, "") for name in STEP_FIGURES]
        self._append(_line([event.run_id, event.sequence, when, event.step.step, *numbers]))

    def _append(self, row: bytes) -> None:
        # What of it was written the next start takes out.
        if self._file.write(row) != len(row):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Lets others write."""
        self._file.close()


def _where_it_ended(written: BinaryIO, run_id: str) -> tuple[int, int]:
    """The last sequence of a run, and how many bytes are whole rows.

    Raises ValueError, TypeError or csv.Error for a file of another kind.
    """
    after = end = 0

    def whole() -> Iterator[str]:
        nonlocal end
        for line in written:
            if not end and not _HEADER.startswith(line):
                raise ValueError("its columns are others")
            if line.endswith(b"\n"):
                end += len(line)
                yield line.decode()

    for row in csv.DictReader(whole()):
        sequence = int(row["sequence"])
        after = sequence if row["run_id"] == run_id else after
    return after, end

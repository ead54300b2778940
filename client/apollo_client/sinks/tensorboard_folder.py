"""Event files of TensorBoard, a folder a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from apollo_client.sinks.figures import figures
from apollo_client.sinks.places import hold, not_ours, require_library
from apollo_grpc.v1 import training_pb2

_STATE = "apollo-watch.json"


class TensorBoardSink:
    """Writes each event's figures as one record to DIR/RUN_ID; `tensorboard --logdir DIR` shows it.

    Each start makes a file of its own. A small state beside them says which bytes of the last one
    count, and up to which event: what was written behind it is taken out.

    Args:
        place: the folder; it is made where there is none.

    Attributes:
        after: sequence of the last event that the files hold.
    """

    def __init__(self, place: str, run_id: str):
        records = require_library("tensorboardX.record_writer", "sinks")
        self._events = require_library("tensorboardX.proto.event_pb2", "sinks")
        self._folder = Path(place) / run_id
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / "apollo-watch.lock").open("ab")
        hold(self._lock, str(self._folder))
        self.after, number, size = self._where_it_ended()
        if number:
            os.truncate(self._file(number), size)
        self._number = number + 1
        self._writer = records.RecordWriter(str(self._file(self._number)))
        self._append(self._events.Event(file_version="brain.Event:2"))

    def _file(self, number: int) -> Path:
        return self._folder / f"events.out.tfevents.{number:06}.apollo"

    def _where_it_ended(self) -> tuple[int, int, int]:
        """The last sequence, and the number and the size of the last file that counts."""
        state = self._folder / _STATE
        if not state.exists():
            return 0, 0, 0
        try:
            after, number, size = map(int, json.loads(state.read_text()))
        except (ValueError, TypeError) as error:
            raise not_ours(str(state), f"it is no state of a sink ({error})") from None
        file = self._file(number)
        if not file.is_file() or file.stat().st_size < size:
            raise not_ours(str(self._folder), f"{file.name} is no longer whole")
        return after, number, size

    def write(self, event: training_pb2.RunEvent) -> None:
        """Writes the figures of a step or an evaluation to the disk. Raises OSError."""
        step, found = figures(event)
        if not found:
            return
        record = self._events.Event(wall_time=event.event_time.ToNanoseconds() / 1e9, step=step)
        for name, value in found.items():
            record.summary.value.add(tag=name, simple_value=value)
        self._append(record)
        self.after = event.sequence
        self._keep_state()

    def _append(self, record: object) -> None:
        self._writer.write(record.SerializeToString())  # type: ignore[attr-defined]
        self._writer.flush()

    def _keep_state(self) -> None:
        size = self._file(self._number).stat().st_size
        beside = self._folder / f"{_STATE}.new"
        beside.write_text(json.dumps([self.after, self._number, size]))
        beside.replace(self._folder / _STATE)

    def close(self) -> None:
        """Lets others write."""
        self._writer.close()
        self._lock.close()

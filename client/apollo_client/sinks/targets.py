"""What a sink is, and which one `KIND:PLACE` names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from apollo_client.sample_values import shown
from apollo_client.sinks.csv_file import CsvSink
from apollo_client.sinks.tensorboard_folder import TensorBoardSink
from apollo_client.sinks.wandb_project import WandbSink
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2


class Sink(Protocol):
    """Takes the events of one run, on one thread.

    Attributes:
        after: sequence of the last event that it holds the figures of; 0 for none.
    """

    after: int

    def write(self, event: training_pb2.RunEvent) -> None:
        """Keeps an event's figures; one without any is passed over. Raises OSError."""

    def close(self) -> None:
        """Writes what is left."""


_KINDS: dict[str, type[CsvSink | TensorBoardSink | WandbSink]] = {
    "csv": CsvSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
}


def require_target(target: str) -> None:
    """Raises InvalidArgument for what names no sink."""
    kind, _, place = target.partition(":")
    if kind not in _KINDS or not place:
        says = f"cannot be {shown(target)}: it is csv:FILE, tensorboard:DIR or wandb:PROJECT"
        raise InvalidArgument.at("--to", says)


def open_sink(target: str, run_id: str) -> Sink:
    """The sink that `csv:FILE`, `tensorboard:DIR` or `wandb:PROJECT` names, where it ended.

    Raises InvalidArgument for another word, FailedPrecondition where the place holds something
    else, is written by another sink, or its library is not installed; OSError.
    """
    require_target(target)
    # It names files.
    if not re.fullmatch(r"[\w-]+", run_id):
        raise InvalidArgument.at("run_id", f"cannot be {shown(run_id)}")
    kind, _, place = target.partition(":")
    return _KINDS[kind](place, run_id)


def recorded(
    events: Iterable[training_pb2.RunEvent], sink: Sink
) -> Iterator[training_pb2.RunEvent]:
    """The same events, each once the sink holds it."""
    for event in events:
        sink.write(event)
        yield event

"""The probes that accepted runs left with a model, on disk beside its Apollo state."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from google.protobuf.json_format import MessageToJson, Parse, ParseError

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.disk import durable_bytes

FILE_NAME = "regression-set.json"
# Of all sets: a change is of milliseconds, and one server owns the state folder.
_CHANGING = threading.Lock()


class RegressionSet:
    """The regression set of one model; any thread but an event loop's.

    All raise FailedPrecondition where the file is none, OSError where the disk refuses.
    """

    def __init__(self, folder: Path):
        self._path = folder / FILE_NAME

    def probes(self) -> list[pb.Probe]:
        """All of them, by name."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return []
        try:
            return list(Parse(text, pb.ListRegressionProbesResponse()).probes)
        except (ParseError, UnicodeDecodeError) as error:
            raise FailedPrecondition(
                f"The regression set {self._path} cannot be read ({error}); nothing was done. "
                "Bring back the file, or move it away to begin with none.",
                reason="REGRESSION_SET_UNREADABLE",
            ) from error

    def add(self, probes: Iterable[pb.Probe]) -> None:
        """Adds probes; one of the same name is replaced."""
        with _CHANGING:
            found = {probe.name: probe for probe in (*self.probes(), *probes)}
            self._write(found[name] for name in sorted(found))

    def remove(self, names: Collection[str]) -> int:
        """Takes out those of these names, or all where there is none; returns how many."""
        with _CHANGING:
            before = self.probes()
            kept = [probe for probe in before if names and probe.name not in names]
            if len(kept) < len(before):
                self._write(kept)
            return len(before) - len(kept)

    def _write(self, probes: Iterable[pb.Probe]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = MessageToJson(pb.ListRegressionProbesResponse(probes=probes))
        durable_bytes(self._path, text.encode())

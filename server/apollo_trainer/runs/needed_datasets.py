"""The datasets of a server, and which of them runs need that have not ended."""

from __future__ import annotations

import threading

from apollo_grpc.errors import FailedPrecondition, Resource
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.config import Settings
from apollo_trainer.datasets import FOLDER, DatasetStore
from apollo_trainer.ledger import EventLog
from apollo_trainer.runs.learned_samples import require_dataset

MIB = 2**20


class NeededDatasets:
    """The store, and deletion of what no run needs. Any thread but an event loop's.

    Raises FailedPrecondition as `DatasetStore` does.
    """

    def __init__(self, settings: Settings):
        self.store = DatasetStore(
            settings.state_dir / FOLDER,
            limit_bytes=settings.dataset_mebibytes * MIB,
            max_samples=settings.max_dataset_samples,
        )
        # A dataset that a run is accepted with is not deleted between its look-up and its entry.
        self._lock, self._needed = threading.Lock(), dict[str, tuple[str, EventLog]]()

    def need(self, run: EventLog, spec: pb.RunSpec) -> None:
        """A run needs what its spec names until it has finished. Raises as `require_dataset`."""
        with self._lock:
            require_dataset(spec, self.store)
            self._enter(run, spec)

    def need_again(self, run: EventLog, spec: pb.RunSpec) -> None:
        """The same for a run that was accepted once: whether it is there shows in its turn."""
        with self._lock:
            self._enter(run, spec)

    def _enter(self, run: EventLog, spec: pb.RunSpec) -> None:
        if spec.dataset_id:
            self._needed[run.run_id] = spec.dataset_id, run

    def forget(self, run_id: str) -> None:
        """A run has ended, or was not accepted."""
        with self._lock:
            self._needed.pop(run_id, None)

    def delete(self, dataset_id: str) -> None:
        """Deletes one. Raises FailedPrecondition while a run needs it, and as the store does."""
        with self._lock:
            # Whoever was told that a run has finished may delete what it needed.
            needing = (run for needed, run in self._needed.values() if needed == dataset_id)
            if run := next((run for run in needing if run.open), None):
                raise FailedPrecondition(
                    f"The run {run.run_id} needs this dataset and has not ended; nothing was "
                    "deleted. Delete it after that, or cancel the run.",
                    reason="DATASET_IN_USE",
                    metadata={"run_id": run.run_id},
                    resource=Resource("dataset", dataset_id),
                )
            self.store.delete(dataset_id)

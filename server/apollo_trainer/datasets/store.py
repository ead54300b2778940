"""The datasets of a server: a folder with a file each, and what they are in memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from apollo_grpc.errors import DataLoss, FailedPrecondition
from apollo_grpc.v1 import dataset_pb2
from apollo_trainer.checkpoints.disk import FILES, TEMPORARY, FileOps
from apollo_trainer.datasets.file_format import (
    ID_DIGITS,
    StoredSamples,
    damaged,
    missing,
    read_about,
)
from apollo_trainer.datasets.room import Room
from apollo_trainer.datasets.upload import Upload

log = logging.getLogger(__name__)
FOLDER = "datasets"
_ID = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}")
About = dataset_pb2.Dataset


class DatasetStore:
    """Datasets by id. One server at a time; removes what a killed one left of uploads.

    `get`, `all` and `samples` look at memory alone; what else there is reads or writes the disk.

    Args:
        folder: made where there is none.
        limit_bytes: of all datasets.
        max_samples: of one dataset.

    Raises FailedPrecondition where the folder cannot be read.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, max_samples: int, ops: FileOps = FILES):
        self.max_samples, self._folder, self._ops = max_samples, folder, ops
        self._room, self._publishing = Room(limit_bytes), Lock()
        # None for a file that is no dataset any more.
        self._found: dict[str, About | None] = {}
        self._sizes: dict[str, int] = {}
        try:
            self._begin()
        except OSError as error:
            raise FailedPrecondition(
                f"The folder {folder} cannot be used ({error.strerror}); what is in it is kept. "
                "Mend that, or choose another state folder with APOLLO_STATE_DIR.",
                reason="STATE_FOLDER_UNUSABLE",
            ) from error

    def _begin(self) -> None:
        self._ops.make_folders(self._folder)
        self._ops.sync_folder(self._folder.parent)
        for name in self._ops.names(self._folder):
            path = self._folder / name
            if name.startswith(TEMPORARY):
                self._ops.remove(path)
            elif _ID.fullmatch(name):
                about = self._found[name] = self._about(path)
                size = about.size_bytes if about else self._ops.stat(path).st_size
                self._sizes[name] = size
                self._room.keep(size)

    def _about(self, path: Path) -> About | None:
        try:
            return read_about(path, self._ops)
        except (DataLoss, OSError) as error:
            log.warning("%s is no dataset, and was left as it is: %s", path, error)
            return None

    # --- reading ----------------------------------------------------------------------------

    def get(self, dataset_id: str) -> About:
        """One dataset. Raises NotFound, DataLoss for one whose file is damaged. Any thread."""
        if dataset_id not in self._found:
            raise missing(dataset_id)
        about = self._found[dataset_id]
        if about is None:
            raise damaged(self._folder / dataset_id)
        return about

    def all(self) -> list[About]:
        """All that are whole, newest first. Any thread."""
        found = [about for about in list(self._found.values()) if about is not None]
        return sorted(found, key=place, reverse=True)

    def samples(self, dataset_id: str) -> StoredSamples:
        """The samples of one, for reading. Raises as `get`."""
        about = self.get(dataset_id)
        return StoredSamples(self._folder / dataset_id, about, self._ops)

    # --- writing ----------------------------------------------------------------------------

    def begin(self, name: str) -> Upload:
        """A new upload; nothing is on disk before its first samples. Any thread."""
        return Upload(self, self._folder, name, self._room, self.max_samples, self._ops)

    def publish(self, staged: Path, about: About, end_with: Callable[[About], None]) -> About:
        """Gives a staged file its name, after `end_with` wrote what it is.

        Its bytes are counted by then. Raises OSError, ResourceExhausted.
        """
        with self._publishing:
            made, old = About(), self._found.get(about.dataset_id)
            made.CopyFrom(about)
            if old is not None:
                made.name = old.name
                made.create_time.CopyFrom(old.create_time)
            is_new = made.dataset_id not in self._sizes
            self._room.take(0, datasets=is_new)
            try:
                end_with(made)
                # Also where it is there: its file may be damaged since.
                self._rename(staged, self._folder / made.dataset_id, is_new)
            except BaseException:
                self._room.give_back(0, datasets=is_new)
                raise
            self._room.give_back(self._sizes.get(made.dataset_id, 0))
            self._found[made.dataset_id], self._sizes[made.dataset_id] = made, made.size_bytes
            return made

    def _rename(self, staged: Path, target: Path, is_new: bool) -> None:
        self._ops.rename(staged, target)
        try:
            self._ops.sync_folder(self._folder)
        except OSError:
            if is_new:
                # It would be there now and perhaps gone after a power failure.
                self._ops.rename(target, staged)
            raise

    def delete(self, dataset_id: str) -> None:
        """Deletes one, damaged or not; a crash leaves it whole or gone. Raises NotFound, and
        FailedPrecondition where the disk refuses.

        Who reads it goes on to its end.
        """
        with self._publishing:
            if dataset_id not in self._found:
                raise missing(dataset_id)
            try:
                self._ops.remove(self._folder / dataset_id)
                del self._found[dataset_id]
                self._room.give_back(self._sizes.pop(dataset_id), datasets=1)
                self._ops.sync_folder(self._folder)
            except OSError as error:
                raise FailedPrecondition(
                    f"The state folder's disk refused to delete the dataset ({error.strerror}); "
                    "'apollo datasets list' shows whether it is there. Mend that, then try again.",
                    reason="DATASET_NOT_WRITTEN",
                ) from error


def place(about: About) -> tuple[int, str]:
    """A dataset's place in a list, from the oldest."""
    return about.create_time.ToNanoseconds(), about.dataset_id

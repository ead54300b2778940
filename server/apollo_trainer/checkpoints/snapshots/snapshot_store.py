"""The snapshots of one model on disk, each a difference to an anchor.

    <parent>/.<model>.apollo/{anchors,snapshots,trash}/

After a crash every entry is complete; half-made ones are removed before the next write. Only one
process writes to a folder: the caller holds its lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from apollo_grpc.errors import (
    AlreadyExists,
    DataLoss,
    NotFound,
    Quota,
    Resource,
    ResourceExhausted,
)
from apollo_trainer.checkpoints.apollo_state import FILE_NAME as STATE_FILE
from apollo_trainer.checkpoints.apollo_state import OPTIMIZER_KEY, read_state, write_state
from apollo_trainer.checkpoints.directory import Progress
from apollo_trainer.checkpoints.disk import (
    FILES,
    FileOps,
    StoreFolder,
    background_threads,
    file_digest,
    own_bytes,
)
from apollo_trainer.checkpoints.host_memory import Memory, empty_like_host
from apollo_trainer.checkpoints.snapshots.anchors import Anchors
from apollo_trainer.checkpoints.snapshots.delta_file import (
    EncodedTensor,
    corrupt_refused,
    encode_tensor,
    write_delta,
)
from apollo_trainer.checkpoints.snapshots.model_state import ModelState
from apollo_trainer.checkpoints.snapshots.snapshot_info import (
    SnapshotInfo,
    read_info,
    require_name,
    write_info,
)

log = logging.getLogger(__name__)
DELTA_FILE = "delta.safetensors"
EXTRA_KEY = "extra"


class Source(Protocol):
    """A model that is being copied."""

    def state(self) -> ModelState:
        """The copy; waits until it is complete."""


class SnapshotStore:
    """Snapshots on disk. Any thread; writes and loads one at a time.

    Args:
        root: the state folder of the model.
        keep_automatic: how many automatic snapshots are kept; older ones are deleted.
        budget_bytes: of all anchors and snapshots; automatic ones give way. 0 is no limit.
        clock: seconds since 1970.
        own: is called before the first write; raises where another process may write.

    Attributes:
        anchors: the snapshots are differences to them.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_automatic: int = 8,
        budget_bytes: int = 0,
        clock: Callable[[], float] = time.time,
        own: Callable[[], object] = lambda: None,
        ops: FileOps = FILES,
    ):
        self._root, self._ops, self._own, self._begun = root, ops, own, False
        self.anchors, self._folder = Anchors(root, ops), StoreFolder(root, "snapshots", ops)
        self._keep, self._budget, self._clock = keep_automatic, budget_bytes, clock
        self._lock = threading.RLock()

    def create(
        self,
        source: Source | ModelState,
        name: str = "",
        progress: Progress = lambda *_: None,
    ) -> SnapshotInfo:
        """Writes a snapshot; it is durable when this returns.

        Args:
            name: the user's; without one the snapshot is automatic.
            progress: may raise, which ends the snapshot.

        Raises AlreadyExists where the name is taken, ResourceExhausted where the budget is too
        small, OSError where the disk refuses; nothing of the snapshot is left then.
        """
        with self._lock:
            name = require_name(name) if name else ""
            self._begin_to_write()
            if name and any(info.name == name for info in self.list()):
                raise AlreadyExists(
                    f"There is a snapshot {name!r}; nothing was written. Delete it, or choose "
                    "another name.",
                    reason="SNAPSHOT_EXISTS",
                    resource=Resource("snapshot", name),
                )
            state = source if isinstance(source, ModelState) else source.state()
            before = set(self.anchors.folder.ids())
            try:
                info = self._build(state, name, progress)
            except BaseException:
                for anchor in set(self.anchors.folder.ids()) - before:
                    self.anchors.folder.drop(anchor)
                raise
            try:
                self._retire()
            except OSError as error:
                # The snapshot is durable; the next one deletes what is too many.
                log.warning("older snapshots were not deleted: %s", error)
            return info

    def _begin_to_write(self) -> None:
        """Makes the folders and removes what a crash left; a store that is only read does not."""
        if not self._begun:
            self._own()
            self.anchors.folder.prepare()
            self._folder.prepare()
            # A process that made them may have ended before it flushed them.
            for folder in (self._root.parent, self._root):
                self._ops.sync_folder(folder)
            self._begun = True

    def _build(self, state: ModelState, name: str, progress: Progress) -> SnapshotInfo:
        total = sum(p.nbytes for p in state.parameters.values())
        progress(0, total, "encoding")
        with self._folder.building() as (new, folder):
            anchor, encoded = self._encoded(state)
            progress(0, total, "writing")
            write_delta(folder / DELTA_FILE, anchor, encoded, self._ops)
            description = {OPTIMIZER_KEY: state.description, EXTRA_KEY: state.extra}
            write_state(folder / STATE_FILE, state.moments, description, self._ops)
            info = SnapshotInfo(
                id=new,
                name=name,
                automatic=not name,
                created=self._clock(),
                optimizer_step=int(state.description["step_count"]),
                weight_version=int(state.extra.get("weight_version", 0)),
                size_bytes=own_bytes(folder, self._ops),
                weights_bytes=total,
                anchor=anchor,
                digests={n: state.digest(n) for n in state.parameters},
                state_digest=file_digest(folder / STATE_FILE, self._ops),
            )
            write_info(folder, info, self._ops)
            self._require_room(info)
            progress(total, total, "making it durable")
            self._folder.publish(new)
        return info

    def _encoded(self, state: ModelState) -> tuple[str, dict[str, EncodedTensor]]:
        threads = background_threads(sum(p.nbytes for p in state.parameters.values()))
        anchor = self.anchors.newest_for(state)
        encoded = self.anchors.encode(anchor, state, threads) if anchor else None
        if encoded is None:
            anchor = self.anchors.create(state)
            encoded = {
                name: encode_tensor(p, p, old_digest=state.digest(name))
                for name, p in state.parameters.items()
            }
        return anchor, encoded

    def list(self) -> list[SnapshotInfo]:
        """All that can be read, the oldest first; the others are logged and left as they are."""
        found = []
        for snapshot in self._folder.ids():
            try:
                found.append(read_info(self._folder.path / snapshot, self._ops))
            except DataLoss as error:
                log.warning("%s", error.message)
        return found

    def get(self, snapshot: str) -> SnapshotInfo:
        """A snapshot by its id. Raises NotFound, and DataLoss where it cannot be read."""
        return read_info(self._entry(snapshot), self._ops)

    def id_of(self, snapshot: str) -> str:
        """The id of a snapshot by its id or its name. Raises NotFound.

        For an id no file is read, so that a damaged snapshot can be deleted.
        """
        if snapshot in self._folder.ids():
            return snapshot
        for info in self.list():
            if info.name == snapshot and snapshot:
                return info.id
        raise NotFound(
            f"There is no snapshot {snapshot[:60]!r}; `apollo checkpoint list` shows them.",
            reason="SNAPSHOT_NOT_FOUND",
            resource=Resource("snapshot", snapshot),
        )

    def delete(self, snapshot: str) -> None:
        """Deletes a snapshot by its id, and an anchor that no other needs. Raises NotFound."""
        with self._lock:
            self._entry(snapshot)
            self._begin_to_write()
            self._folder.remove(snapshot)
            self._drop_anchors()

    def load(self, snapshot: str, memory: Memory = empty_like_host) -> ModelState:
        """Decodes and verifies a snapshot by its id; the live weights are not touched.

        Args:
            memory: allocates weights and moments.

        Raises NotFound, and DataLoss where a byte of it is not as it was written.
        """
        with self._lock:
            folder = self._entry(snapshot)
            info = read_info(folder, self._ops)
            with (
                corrupt_refused(f"The snapshot {snapshot}"),
                ThreadPoolExecutor(1, "moments") as beside,
            ):
                path, delta = folder / STATE_FILE, folder / DELTA_FILE
                state = beside.submit(read_state, path, info.state_digest, memory, self._ops)
                weights = self.anchors.decode(delta, info.anchor, info.digests, memory)
                moments, found = state.result()
                digests = dict(info.digests)
                return ModelState(weights, moments, found[OPTIMIZER_KEY], found[EXTRA_KEY], digests)

    def size_bytes(self) -> int:
        """Bytes of all anchors and snapshots."""
        folders = (self._folder.path, self.anchors.folder.path)
        return sum(own_bytes(folder, self._ops) for folder in folders)

    def _entry(self, snapshot: str) -> Path:
        if snapshot not in self._folder.ids():
            raise NotFound(
                f"There is no snapshot {snapshot[:60]!r}.",
                reason="SNAPSHOT_NOT_FOUND",
                resource=Resource("snapshot", snapshot),
            )
        return self._folder.path / snapshot

    def _require_room(self, info: SnapshotInfo) -> None:
        """Raises ResourceExhausted where it would not fit even without the automatic ones."""
        staying = [each for each in self.list() if not each.automatic]
        folders = {self.anchors.path(each.anchor).parent for each in (*staying, info)}
        needed = sum(each.size_bytes for each in (*staying, info))
        needed += sum(own_bytes(folder, self._ops) for folder in folders)
        if self._budget and needed > self._budget:
            raise ResourceExhausted(
                f"The snapshot and the named ones need {needed} bytes, and the budget is "
                f"{self._budget}; nothing was written. Delete snapshots, or raise the budget.",
                reason="SNAPSHOT_BUDGET",
                quota=Quota("snapshot_bytes", f"at most {self._budget}"),
            )

    def _retire(self) -> None:
        """Deletes automatic snapshots, the oldest first, until both limits are kept."""
        self._drop_anchors()
        automatic = [info.id for info in self.list() if info.automatic]
        newest = self._folder.ids()[-1]
        while automatic and (
            len(automatic) > self._keep or (self._budget and self.size_bytes() > self._budget)
        ):
            if (oldest := automatic.pop(0)) == newest:
                return
            self._folder.remove(oldest)
            self._drop_anchors()

    def _drop_anchors(self) -> None:
        """Removes anchors that no snapshot needs, but the newest: the next one begins from it."""
        infos, anchors = self.list(), self.anchors.folder.ids()
        if len(infos) < len(self._folder.ids()):
            # One that cannot be read may need any of them.
            return
        needed = {info.anchor for info in infos} | set(anchors[-1:])
        for anchor in anchors:
            if anchor not in needed:
                self.anchors.folder.drop(anchor)

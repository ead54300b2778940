"""What is kept of one attached model to go back to: snapshots on disk, updates in memory."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from apollo_grpc.errors import FailedPrecondition, OutOfRange, ResourceExhausted, Unavailable
from apollo_trainer.checkpoints.directory import (
    Place,
    Progress,
    Spare,
    SyncMethod,
    SyncOptions,
    SyncOutcome,
    owned,
    place_under,
    refuse_read_only,
    sync_directory,
    why_not_synced,
)
from apollo_trainer.checkpoints.disk import durable_bytes, flush_folder
from apollo_trainer.checkpoints.host_memory import HostBuffers
from apollo_trainer.checkpoints.snapshots import (
    ModelState,
    Poison,
    SnapshotCopy,
    SnapshotInfo,
    SnapshotStore,
    SnapshotWriter,
    UndoRing,
    WriteVersions,
    WriteWatch,
    restore,
)
from apollo_trainer.config import Settings
from apollo_trainer.optim import Apollo
from apollo_trainer.weights.attach import Attachment

log = logging.getLogger(__name__)
MIB = 2**20
CUT_OFF = "restore-at-work.json"
Pausing = AbstractContextManager[None]


class ModelCheckpoints:
    """Snapshots, undo and restore of one attachment; used by the training thread.

    Args:
        folder: of the server's own; it holds the mark of a restore that is at work.

    Attributes:
        watch: the optimizer's `before_param_write`.
        poison: why the live weights are mixed; no run and no sync may begin then.
        not_synced: what a sync would be refused for, in a sentence; empty where nothing was seen.
        store: the snapshots on disk; what writes there raises as `place` does.
    """

    def __init__(self, attachment: Attachment, folder: Path, settings: Settings):
        self._attachment, self._folder, self._settings = attachment, folder, settings
        self._mark = folder / CUT_OFF
        self.watch, self.poison = WriteWatch(), Poison()
        self._versions, self._spare = WriteVersions(), Spare(keeps=settings.sync_keeps_previous)
        self.watch.add(self._versions.before_write)
        parameters = attachment.parameters().values()
        on_device = any(p.is_cuda for p in parameters)
        self._memory = HostBuffers(on_device, keeps=settings.snapshots_keep_memory)
        # A link may lead to another model by the time of a sync.
        self._place = place_under(Path(attachment.directory), settings.checkpoint_dir)
        self.not_synced, self._seen = "", self._place.seen()
        self._owned, self._owning = ExitStack(), threading.Lock()
        self._is_owner = self._closed = False
        # Whoever only looks at it writes nothing, and needs not be the owner.
        self.store = SnapshotStore(
            self._place.state,
            keep_automatic=settings.automatic_snapshots,
            budget_bytes=settings.snapshot_mebibytes * MIB,
            own=lambda: self.place,
        )
        self._writer: SnapshotWriter | None = None
        self._snapshot: Future[SnapshotInfo] | None = None
        budget = settings.undo_mebibytes * MIB
        weights = sum(p.nbytes for p in parameters)
        # A copy of the weights at every step is what a larger model would pay for it.
        self._ring = UndoRing(budget) if weights <= budget else None
        if self._ring is not None:
            self.watch.add(self._ring.before_write)
        self._look_for_one_cut_off()

    @property
    def directory(self) -> Path:
        """The model directory that was attached, links resolved."""
        return self._place.directory

    @property
    def state(self) -> Path:
        """Its state folder, which may be another server's."""
        return self._place.state

    @property
    def place(self) -> Place:
        """The model directory and its state folder, which from now on are this server's alone.

        Raises Unavailable where another server keeps them, OSError where the folder cannot be made.
        """
        with self._owning:
            # A lock that is taken after the end would never be let go of.
            if self._closed:
                raise Unavailable("vLLM went. Nothing was done.", reason="ENGINE_LOST")
            if not self._is_owner:
                self._place.state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._owned.enter_context(owned(self._place))
                self._is_owner = True
            return self._place

    # --- what training does -----------------------------------------------------------------

    @contextmanager
    def recording(self, optimizer: Apollo) -> Iterator[None]:
        """Around one update: it can be taken back afterwards, one that failed halfway too."""
        if self._ring is None:
            yield
            return
        parameters = self._attachment.parameters()
        self._ring.begin(parameters, optimizer)
        try:
            yield
        finally:
            self._ring.end(parameters)

    def forget_updates(self) -> None:
        """They belong to an optimizer that is no more."""
        if self._ring is not None:
            self._ring.clear()

    @property
    def snapshot_at_work(self) -> Future[SnapshotInfo] | None:
        """The snapshot that is being copied or written; no other one can begin before its end."""
        return None if self._snapshot is None or self._snapshot.done() else self._snapshot

    def snapshot(
        self,
        optimizer: Apollo,
        extra: dict[str, Any],
        name: str = "",
        progress: Progress = lambda *_: None,
    ) -> Future[SnapshotInfo]:
        """Begins a snapshot of this moment, between two steps; what it copies late, steps copy.

        Args:
            extra: what JSON can hold, kept with the state.
            name: the user's; without one it is automatic.

        Raises ResourceExhausted while another one is at work: each holds a copy of the weights.
        """
        if self.snapshot_at_work:
            raise ResourceExhausted(
                "A snapshot is still being written; there is memory for one at a time. This one "
                "was not taken.",
                reason="SNAPSHOT_AT_WORK",
            )
        _ = self.place
        writer = self._writer = self._writer or SnapshotWriter(self.store)
        parameters = self._attachment.parameters()
        copying = SnapshotCopy(parameters, optimizer, extra, self._memory)
        self.watch.add(copying.before_write)
        future = writer.write(copying.start(), name, progress)
        self._snapshot = future
        future.add_done_callback(lambda _: self.watch.remove(copying.before_write))
        return future

    def sync(self, progress: Progress, method: SyncMethod | None) -> SyncOutcome:
        """Syncs the model directory. Raises as `sync_directory`, and where weights are mixed."""
        self.poison.require_sound()
        # Before all of it is written to a disk that then refuses the last step.
        refuse_read_only(self._place)
        reader = self._attachment.checkpoint()

        def version(name: str) -> int:
            parameter = reader.parameter(name)
            assert parameter is not None
            return self._versions.of(parameter)

        options = SyncOptions(method, self.place.state, spare=self._spare, seen=self._seen)
        outcome = sync_directory(self.directory, reader, progress, version, options)
        # From now on the manifest knows; who takes that away wants the live weights.
        self._seen = {}
        return outcome

    def look(self) -> None:
        """Finds out what a sync would refuse the directory for as it is, for `not_synced`."""
        why = why_not_synced(self._place, self._attachment.checkpoint())
        self.not_synced = why and f"A sync would be refused: {why}"

    # --- ways back --------------------------------------------------------------------------

    def load(self, snapshot: str) -> ModelState:
        """Decodes and verifies a snapshot. Raises as `SnapshotStore.load`."""
        if self._ring is not None:
            # It holds the memory after a restore, until what was live before is encoded.
            return self.store.load(snapshot)
        return self.store.load(snapshot, self._memory.take)

    def put(self, state: ModelState, optimizer: Apollo, paused: Pausing) -> None:
        """Makes a state of `load` the live model, and uses it up. Raises as `restore`.

        `end_restore` is to follow, once the new Apollo state is on disk.

        Args:
            paused: vLLM, while the weights are written.
        """
        if self._ring is not None:
            self._ring.settle()
        with self._at_work(paused):
            old = restore(state, self._attachment.parameters(), optimizer, self._ring, self.poison)
        if self._ring is None:
            self._memory.keep_only(*old.parameters.values(), *old.moments.values())

    def undo(self, count: int, optimizer: Apollo, paused: Pausing) -> None:
        """Takes the last updates back. Raises as `UndoRing.undo`, and where weights are mixed.

        `end_restore` is to follow, once the new Apollo state is on disk.

        Args:
            paused: vLLM, while the weights are written.
        """
        # It would write what the last updates wrote, which may not be all that is mixed.
        self.poison.require_sound()
        parameters, writing = self._attachment.parameters(), self._at_work(paused)
        if self._ring is None:
            raise self._no_undo(sum(p.nbytes for p in parameters.values()))
        self._ring.undo(count, parameters, optimizer, self.poison, writing)

    def _no_undo(self, weights: int) -> OutOfRange:
        return OutOfRange(
            f"No updates are kept of this model: its weights take {-(-weights // MIB)} MiB, and "
            f"undo_mebibytes is {self._settings.undo_mebibytes}. Nothing was changed. Restore a "
            "snapshot, or start the training server with a larger --undo-mebibytes.",
            reason="UNDO_OFF",
        )

    @contextmanager
    def _at_work(self, paused: Pausing) -> Iterator[None]:
        """A mark on disk until `end_restore`: a server that is killed before leaves mixed weights,
        or whole ones whose Apollo state is gone."""
        was_there = self._mark.exists()
        self._put_mark()
        try:
            with paused:
                yield
        except BaseException:
            # All is as it was, with the state on disk that belongs to it.
            if not (was_there or self.poison.why):
                self._remove_mark()
            raise

    def _put_mark(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable_bytes(self._mark, json.dumps({"epoch": self._attachment.epoch}).encode())
        except OSError as error:
            raise FailedPrecondition(
                f"{self._mark} cannot be written ({error.strerror or error}); nothing was changed. "
                "Make room in the server's state folder, then ask again.",
                reason="STATE_NOT_SAVED",
            ) from error

    def end_restore(self) -> str:
        """The state of the live weights is on disk, so that neither is mixed with another's.

        Returns why the mark of the restore could not be removed; empty where there is none.
        """
        self.poison.why = ""
        try:
            if self._mark.exists():
                self._remove_mark()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _look_for_one_cut_off(self) -> None:
        if not self._mark.exists():
            return
        try:
            epoch = json.loads(self._mark.read_bytes())["epoch"]
        except (ValueError, KeyError, TypeError):
            epoch = self._attachment.epoch
        if epoch != self._attachment.epoch:
            # The mixed weights went with their engine.
            self._remove_mark()
            return
        self.poison.why = (
            "the training server ended in a restore or an undo, before weights and Apollo state "
            "were both in place."
        )

    def _remove_mark(self) -> None:
        self._mark.unlink(missing_ok=True)
        flush_folder(self._folder)

    def close(self) -> None:
        """Ends the threads, once what they write is on disk."""
        if self._writer:
            self._writer.stop()
        if self._ring is not None:
            self._ring.stop()
        self._spare.remove()
        with self._owning:
            self._closed = True
            self._owned.close()

"""What one attached model can go back to: snapshots on disk, updates in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from apollo_trainer.checkpoints.disk import Mark
from apollo_trainer.checkpoints.host_memory import HostBuffers
from apollo_trainer.checkpoints.snapshots import (
    ModelState,
    Poison,
    SnapshotCopy,
    SnapshotInfo,
    SnapshotStore,
    UndoRing,
    WriteVersions,
    WriteWatch,
    of_all_ranks,
    restore,
)
from apollo_trainer.config import Settings
from apollo_trainer.optim import Apollo
from apollo_trainer.weights.attachment import Attachment

MIB = 2**20
CUT_OFF = "restore-at-work.json"
Pausing = AbstractContextManager[None]


class ModelCheckpoints:
    """Snapshots, undo, restore and sync of one attachment; used by the training thread.

    Args:
        folder: the server's own for this model; a mark in it says that a restore is at work.

    Attributes:
        directory: the model directory that was attached, links resolved.
        state: its state folder, which may be another server's.
        watch: the optimizer's `before_param_write`.
        poison: why the live weights are mixed; no run and no sync may begin then.
        not_synced: why a sync would be refused, in a sentence; empty where nothing was found.
        ring: the updates that `undo` takes back; any thread may ask how many.
        store: the snapshots on disk; its writes raise as `place` does.
    """

    def __init__(self, attachment: Attachment, folder: Path, settings: Settings):
        self._attachment, self._settings = attachment, settings
        self._mark = Mark(folder / CUT_OFF)
        self.watch, self.poison = WriteWatch(), Poison()
        self._versions, self._spare = WriteVersions(), Spare(keeps=settings.sync_keeps_previous)
        self.watch.add(self._versions.before_write)
        parameters = attachment.parameters().values()
        on_device = any(p.is_cuda for p in parameters)
        self._memory = HostBuffers(on_device, keeps=settings.snapshots_keep_memory)
        # Resolved once: a link may lead to another model by the time of a sync.
        self._place = place_under(Path(attachment.directory), settings.checkpoint_dir)
        self.directory, self.state = self._place.directory, self._place.state
        self.not_synced, self._seen = "", self._place.seen()
        self._owned, self._owning = ExitStack(), threading.Lock()
        self._is_owner = self._closed = False
        # Owned at the first write: several servers may read.
        self.store = SnapshotStore(
            self.state,
            keep_automatic=settings.automatic_snapshots,
            budget_bytes=settings.snapshot_mebibytes * MIB,
            own=lambda: self.place,
        )
        self._writer = ThreadPoolExecutor(1, "snapshot-writer")
        self._snapshot: Future[SnapshotInfo] | None = None
        self.ring = undo_of(attachment, settings)
        if self.ring.keeps:
            self.watch.add(self.ring.before_write)
        self._look_for_one_cut_off()

    @property
    def place(self) -> Place:
        """The model directory and its state folder, which this server owns from now on. Any thread.

        Raises Unavailable where another server owns them, OSError where the folder cannot be made.
        """
        with self._owning:
            # Nobody would release a lock that is taken after `close`.
            if self._closed:
                raise Unavailable("vLLM went. Nothing was done.", reason="ENGINE_LOST")
            if not self._is_owner:
                self.state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._owned.enter_context(owned(self._place))
                self._is_owner = True
            return self._place

    def recording(self, optimizer: Apollo) -> AbstractContextManager[None]:
        """Around one update: it can be undone afterwards, also where it failed halfway."""
        return self.ring.recording(self._attachment.parameters(), optimizer)

    def forget_updates(self) -> None:
        """Drops all updates: they belong to an optimizer that is no more."""
        self._attachment.ranks.tell("forget")
        self.ring.clear()

    @property
    def snapshot_at_work(self) -> Future[SnapshotInfo] | None:
        """The snapshot that is being copied or written; another can begin after it."""
        return None if self._snapshot is None or self._snapshot.done() else self._snapshot

    def snapshot(
        self,
        optimizer: Apollo,
        extra: dict[str, Any],
        name: str = "",
        progress: Progress = lambda *_: None,
    ) -> Future[SnapshotInfo]:
        """Begins a snapshot of this moment, between two steps; it is copied while they go on.

        What ranks divide is copied before this returns.

        Args:
            extra: kept with the state; what JSON can hold.
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
        if self._attachment.ranks.size > 1:
            state = of_all_ranks(self._attachment.checkpoint(), optimizer, extra)
            self._snapshot = self._writer.submit(self.store.create, state, name, progress)
            return self._snapshot
        copying = SnapshotCopy(self._attachment.parameters(), optimizer, extra, self._memory)
        self.watch.add(copying.before_write)
        self._snapshot = self._writer.submit(copying.start().write_to, self.store, name, progress)
        self._snapshot.add_done_callback(lambda _: self.watch.remove(copying.before_write))
        return self._snapshot

    def sync(self, progress: Progress, method: SyncMethod | None) -> SyncOutcome:
        """Syncs the model directory. Raises as `sync_directory`, and where weights are mixed."""
        self.poison.require_sound()
        # Now, not after all is written and only the last rename fails.
        refuse_read_only(self._place)
        reader = self._attachment.checkpoint()

        def version(name: str) -> int:
            parameter = reader.parameter(name)
            assert parameter is not None
            return self._versions.of(parameter)

        options = SyncOptions(method, self.place.state, spare=self._spare, seen=self._seen)
        outcome = sync_directory(self.directory, reader, progress, version, options)
        # From now on the manifest has what was seen; whoever deletes it asks for the live weights.
        self._seen = {}
        return outcome

    def look(self) -> None:
        """Sets `not_synced` from the directory as it is."""
        why = why_not_synced(self._place, self._attachment.checkpoint())
        self.not_synced = why and f"A sync would be refused: {why}"

    # --- ways back --------------------------------------------------------------------------

    def load(self, snapshot: str) -> ModelState:
        """Decodes and verifies a snapshot. Raises as `SnapshotStore.load`."""
        if self.ring.keeps or self._attachment.ranks.size > 1:
            # The ring reads this memory after the restore: it cannot be the next snapshot's.
            return self.store.load(snapshot)
        return self.store.load(snapshot, self._memory.take)

    def put(self, state: ModelState, optimizer: Apollo, paused: Pausing) -> None:
        """Makes a state of `load` the live model, and uses it up. Raises as `restore`.

        Call `end_restore` once the new Apollo state is on disk.

        Args:
            paused: pauses vLLM while the weights are written.
        """
        self.ring.settle()
        keep = self.ring.add if self.ring.keeps else None
        with self._at_work(paused):
            old = restore(state, self._attachment.parameters(), optimizer, keep, self.poison)
        if not self.ring.keeps and self._attachment.ranks.size == 1:
            self._memory.keep_only(*old.parameters.values(), *old.moments.values())

    def undo(self, count: int, optimizer: Apollo, paused: Pausing) -> None:
        """Undoes the last updates. Raises as `UndoRing.undo`, and where weights are mixed.

        Call `end_restore` once the new Apollo state is on disk.

        Args:
            paused: pauses vLLM while the weights are written.
        """
        # An undo writes only what the last updates wrote: other weights would stay mixed.
        self.poison.require_sound()
        if not self.ring.keeps:
            weights = self._attachment.whole_bytes()
            raise OutOfRange(
                f"No updates are kept of this model: its weights take {-(-weights // MIB)} "
                f"MiB, and undo_mebibytes is {self._settings.undo_mebibytes}. Nothing was changed. "
                "Restore a snapshot, or start the training server with a larger --undo-mebibytes.",
                reason="UNDO_OFF",
            )
        writing = self._at_work(paused)
        self.ring.undo(count, self._attachment.parameters(), optimizer, self.poison, writing)

    @contextmanager
    def _at_work(self, paused: Pausing) -> Iterator[None]:
        """Marks a restore on disk until `end_restore`: before, weights and state are not of one."""
        was_there = self._mark.exists
        try:
            self._write_mark()
        except OSError as error:
            raise FailedPrecondition(
                f"{self._mark} cannot be written ({error.strerror or error}); nothing was changed. "
                "Make room in the server's state folder, then ask again.",
                reason="STATE_NOT_SAVED",
            ) from error
        try:
            with paused:
                yield
        except BaseException:
            # The old weights are back, and their Apollo state is on disk.
            if not (was_there or self.poison.why):
                self._mark.remove()
            raise

    def end_restore(self) -> str:
        """Removes the mark: weights and the state on disk belong together. Returns why it stays."""
        self.poison.why = ""
        try:
            self._mark.remove()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def doubt(self, why: str) -> None:
        """Takes the live weights for mixed, also after a restart, until a restore succeeds."""
        self.poison.why = why
        self._write_mark()

    def _look_for_one_cut_off(self) -> None:
        if not self._mark.exists:
            return
        own = self._attachment.epoch
        if self._mark.read().get("epoch", own) != own:
            # The mixed weights went with their engine.
            self._mark.remove()
            return
        self.poison.why = (
            "the training server ended in a restore or an undo, before weights and Apollo state "
            "were both in place."
        )

    def _write_mark(self) -> None:
        self._mark.write({"epoch": self._attachment.epoch})

    def close(self) -> None:
        """Ends the threads, once what they write is on disk, and releases the directory."""
        self._writer.shutdown()
        self.ring.stop()
        self._spare.remove()
        with self._owning:
            self._closed = True
            self._owned.close()


def undo_of(attachment: Attachment, settings: Settings) -> UndoRing:
    """Where one rank keeps its part of updates, if it does: all of them, or none."""
    budget = settings.undo_mebibytes * MIB
    # Undo copies the weights at every step: a larger model goes without.
    return UndoRing(budget // attachment.ranks.size, keeps=attachment.whole_bytes() <= budget)

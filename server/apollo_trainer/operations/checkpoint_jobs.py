"""The jobs on checkpoints: sync, verify, adopt, export, snapshots, restore, undo.

Where a version of the live weights is expected, each raises Aborted if they have another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from apollo_grpc.errors import Unavailable
from apollo_grpc.times import now
from apollo_grpc.v1 import status_pb2
from apollo_trainer.checkpoints.directory import (
    Adoption,
    Exported,
    Progress,
    SyncMethod,
    SyncOutcome,
    Verification,
    adopt_directory,
    export_directory,
    verify_directory,
)
from apollo_trainer.checkpoints.snapshots import SnapshotInfo
from apollo_trainer.engine import ModelOwner, Session, StatusBoard
from apollo_trainer.operations.job import Job
from apollo_trainer.operations.restore import Restore, Restored, require_version

T = TypeVar("T")
# Told of a sync: its seconds, bytes written, and the engine's epoch and weight version.
Synced = Callable[[float, int, str, int], None]


class CheckpointJobs:
    """Each method queues a job for the training thread and returns its future.

    Jobs wait for the run at work. Any thread may call, event loops too. All raise Unavailable when
    the server stops; a future holds it where the job had not begun, or no engine is attached.
    """

    def __init__(self, owner: ModelOwner, board: StatusBoard):
        self._owner, self._board = owner, board
        self.synced: Synced = lambda *_: None

    def _begin(self, progress: Progress, work: Callable[[Session, Job[T]], T]) -> Job[T]:
        job = Job[T](progress)
        self._owner.between_runs(lambda: work(self._owner.session(), job), job)
        return job

    def sync(
        self,
        progress: Progress,
        method: SyncMethod | None = None,
        expected_version: int | None = None,
    ) -> Job[tuple[SyncOutcome, int]]:
        """Syncs the model directory; the result holds the weight version too."""

        def sync(session: Session, job: Job[tuple[SyncOutcome, int]]) -> tuple[SyncOutcome, int]:
            require_version(session, expected_version)
            return self._sync(session, job, method)

        return self._begin(progress, sync)

    def verify(
        self, progress: Progress, *, full: bool, live: bool
    ) -> Job[tuple[str, Verification]]:
        """Compares the model directory with its manifest; the result holds its name, too."""

        def verify(session: Session, job: Job[Any]) -> tuple[str, Verification]:
            place = session.checkpoints.place
            reader = session.attachment.checkpoint() if live else None
            found = verify_directory(
                place.directory, reader, full=full, progress=job.progress, state=place.state
            )
            return session.attachment.directory, found

        return self._begin(progress, verify)

    def adopt(self, target: Path, progress: Progress) -> Job[Adoption]:
        """Copies the model directory to one of its own."""
        return self._begin(
            progress,
            lambda session, job: adopt_directory(
                session.checkpoints.directory, target, job.progress
            ),
        )

    def export(
        self, target: Path, progress: Progress, expected_version: int | None = None
    ) -> Job[tuple[Exported, int]]:
        """Writes the live weights into a new directory; the result holds their version too."""

        def export(session: Session, job: Job[tuple[Exported, int]]) -> tuple[Exported, int]:
            require_version(session, expected_version)
            checkpoints, reader = session.checkpoints, session.attachment.checkpoint()
            checkpoints.poison.require_sound()
            source, state = checkpoints.directory, checkpoints.state
            exported = export_directory(source, target, reader, progress=job.progress, state=state)
            return exported, session.weight_version

        return self._begin(progress, export)

    def snapshot(
        self, name: str, progress: Progress, expected_version: int | None = None
    ) -> Job[SnapshotInfo]:
        """Keeps weights and Apollo state; training goes on once they are copied.

        One at a time: the next begins when the one before is on disk.
        """
        done = Job[SnapshotInfo](progress)

        def begin() -> None:
            session = self._owner.session()
            if at_work := session.checkpoints.snapshot_at_work:
                # Without a copy of the weights, and without keeping other jobs waiting.
                at_work.add_done_callback(lambda _: again())
                return
            if not done.set_running_or_notify_cancel():
                return
            require_version(session, expected_version)
            session.require_sound()
            total = sum(p.nbytes for p in session.attachment.parameters().values())
            done.progress(0, total, "copying")
            written = session.checkpoints.snapshot(
                session.optimizer, session.extra(), name, done.progress
            )
            written.add_done_callback(lambda written: _settle(done, written))

        def queue() -> None:
            self._owner.between_runs(begin).add_done_callback(failed)

        def failed(begun: Future[None]) -> None:
            if begun.exception():
                _settle(done, begun)

        def again() -> None:
            try:
                queue()
            except Unavailable as error:
                with suppress(InvalidStateError):
                    done.set_exception(error)

        queue()
        return done

    def delete(self, snapshot: str, progress: Progress) -> Job[None]:
        """Deletes a snapshot, by id or name."""

        def delete(session: Session, job: Job[None]) -> None:
            job.close()
            store = session.checkpoints.store
            store.delete(store.id_of(snapshot))

        return self._begin(progress, delete)

    def restore(
        self, snapshot: str, expected_version: int | None, progress: Progress
    ) -> Job[Restored]:
        """Puts a snapshot, by id or name, into the live model."""
        return self._begin(
            progress,
            lambda session, job: self._back(session, expected_version).snapshot(snapshot, job),
        )

    def undo(
        self,
        updates: int,
        expected_version: int | None,
        progress: Progress = lambda *_: None,
    ) -> Job[Restored]:
        """Takes the last updates back."""
        return self._begin(
            progress,
            lambda session, job: self._back(session, expected_version).undo(updates, job),
        )

    def _back(self, session: Session, expected_version: int | None) -> Restore:
        return Restore(session, self._owner, self._board, expected_version)

    def _sync(
        self, session: Session, job: Job[tuple[SyncOutcome, int]], method: SyncMethod | None
    ) -> tuple[SyncOutcome, int]:
        session.attachment.require_as_left()
        began = time.monotonic()
        try:
            outcome = session.checkpoints.sync(job.progress, method)
        finally:
            # Room came or went, or somebody mended what was told at the attachment.
            session.checkpoints.look()
            self._board.show(session)
        version, directory = session.weight_version, session.attachment.directory

        def change(status: status_pb2.ServerStatus) -> None:
            status.last_sync.time.CopyFrom(now())
            status.last_sync.weight_version = version
            status.last_sync.directory = directory

        self._board.update(change)
        epoch, seconds = session.attachment.epoch, time.monotonic() - began
        self.synced(seconds, outcome.bytes_written, epoch, version)
        return outcome, version


def _settle(done: Future[Any], ended: Future[Any]) -> None:
    """Gives a job the end of another one; a job that was cancelled while it waited has its own."""
    with suppress(InvalidStateError):
        if error := ended.exception():
            done.set_exception(error)
        else:
            done.set_result(ended.result())

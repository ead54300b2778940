"""What is done about checkpoints between two runs, on the training thread."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_grpc.errors import Aborted, ApolloError, OutOfRange, Unavailable
from apollo_grpc.times import now
from apollo_grpc.v1 import status_pb2, training_pb2
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
from apollo_trainer.engine import EnginePause, ModelOwner, Session, StatusBoard, engine_is_gone
from apollo_trainer.operations.job import Job
from apollo_trainer.training.options import StateShape

log = logging.getLogger(__name__)
MAX_UNDO = 10_000


@dataclass(frozen=True)
class Restored:
    """What a restore or an undo came to.

    Attributes:
        warnings: what went wrong once the weights were written.
    """

    weight_version: int
    optimizer_step: int
    bytes_written: int
    warnings: list[training_pb2.Warning]


class CheckpointJobs:
    """Each method begins a job and returns its future; jobs wait for the run at work.

    Any thread may call them, event loops too: they only put a job into the training thread's queue.
    All raise Unavailable when the server stops or no engine is attached; what had not begun by the
    server's stop ends with that.
    """

    def __init__(self, owner: ModelOwner, board: StatusBoard):
        self._owner, self._board = owner, board

    def sync(
        self, progress: Progress, method: SyncMethod | None = None
    ) -> Future[tuple[SyncOutcome, int]]:
        """Syncs the model directory; the result holds the weight version too."""
        job = Job[tuple[SyncOutcome, int]](progress)
        return self._owner.between_runs(lambda: self._sync(job.progress, method), job)

    def verify(self, progress: Progress, *, full: bool, live: bool) -> Future[Verification]:
        """Compares the model directory with its manifest."""
        job = Job[Verification](progress)

        def verify() -> Verification:
            session = self._owner.session()
            place = session.checkpoints.place
            reader = session.attachment.checkpoint() if live else None
            return verify_directory(
                place.directory, reader, full=full, progress=job.progress, state=place.state
            )

        return self._owner.between_runs(verify, job)

    def adopt(self, target: Path, progress: Progress) -> Future[Adoption]:
        """Copies the model directory to one of its own."""
        job = Job[Adoption](progress)
        return self._owner.between_runs(
            lambda: adopt_directory(
                self._owner.session().checkpoints.directory, target, job.progress
            ),
            job,
        )

    def export(self, target: Path, progress: Progress) -> Future[tuple[Exported, int]]:
        """Writes the live weights into a new directory; the result holds their version too."""
        job = Job[tuple[Exported, int]](progress)

        def export() -> tuple[Exported, int]:
            session = self._owner.session()
            checkpoints, reader = session.checkpoints, session.attachment.checkpoint()
            checkpoints.poison.require_sound()
            source, state = checkpoints.directory, checkpoints.state
            exported = export_directory(source, target, reader, progress=job.progress, state=state)
            return exported, self._version()

        return self._owner.between_runs(export, job)

    def snapshot(self, name: str, progress: Progress) -> Future[SnapshotInfo]:
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
            session.require_sound()
            extra = session.extra(self._version())
            total = sum(p.nbytes for p in session.attachment.parameters().values())
            done.progress(0, total, "copying")
            written = session.checkpoints.snapshot(session.optimizer, extra, name, done.progress)
            written.add_done_callback(lambda future: _pass_on(future, done))

        def queue() -> None:
            begun = self._owner.between_runs(begin)
            begun.add_done_callback(lambda begun: _pass_error(begun, done))

        def again() -> None:
            try:
                queue()
            except Unavailable as error:
                _fail(done, error)

        queue()
        return done

    def delete(self, snapshot: str) -> Future[None]:
        """Deletes a snapshot, by id or name."""

        def delete() -> None:
            store = self._owner.session().checkpoints.store
            store.delete(store.id_of(snapshot))

        return self._owner.between_runs(delete)

    def restore(
        self, snapshot: str, expected_version: int | None, progress: Progress
    ) -> Future[Restored]:
        """Puts a snapshot, by id or name, into the live model."""
        job = Job[Restored](progress)
        return self._owner.between_runs(
            lambda: self._restore(self._owner.session(), snapshot, expected_version, job), job
        )

    def undo(self, updates: int, expected_version: int | None) -> Future[Restored]:
        """Takes the last updates back."""

        def undo() -> Restored:
            session = self._owner.session()
            self._require_version(expected_version)
            if not 0 < updates <= MAX_UNDO:
                raise OutOfRange(
                    f"{updates} updates cannot be taken back; nothing was changed.",
                    reason="UNDO_OUT_OF_RANGE",
                )
            untold: list[ApolloError] = []
            session.checkpoints.undo(updates, session.optimizer, self._paused(session, untold))
            return self._restored(session, untold)

        return self._owner.between_runs(undo)

    # --- on the training thread -------------------------------------------------------------

    def _version(self) -> int:
        return self._board.snapshot().weight_version

    def _require_version(self, expected: int | None) -> None:
        version = self._version()
        if expected not in (None, version):
            raise Aborted(
                f"The live weights have version {version}, not {expected}; nothing was changed. "
                "Look at what was learned meanwhile, then ask again.",
                reason="WEIGHT_VERSION_CHANGED",
                metadata={"weight_version": str(version)},
            )

    def _sync(self, progress: Progress, method: SyncMethod | None) -> tuple[SyncOutcome, int]:
        session = self._owner.session()
        session.attachment.require_as_left()
        try:
            outcome = session.checkpoints.sync(progress, method)
        finally:
            # Room came or went, or somebody mended what was told at the attachment.
            session.checkpoints.look()
            self._board.update(session.show)
        version, directory = self._version(), session.attachment.directory

        def change(status: status_pb2.ServerStatus) -> None:
            status.last_sync.time.CopyFrom(now())
            status.last_sync.weight_version = version
            status.last_sync.directory = directory

        self._board.update(change)
        return outcome, version

    def _restore(
        self, session: Session, snapshot: str, expected: int | None, job: Job[Restored]
    ) -> Restored:
        self._require_version(expected)
        info = find_snapshot(session, snapshot)
        job.progress(0, info.weights_bytes, "decoding and verifying")
        state = session.checkpoints.load(info.id)
        shape = StateShape(**state.extra["shape"])
        optimizer = session.optimizer_of(shape)
        job.progress(0, info.weights_bytes, "writing")
        # From the first weight that is written on it is finished, or taken back by itself.
        job.close()
        untold: list[ApolloError] = []
        session.checkpoints.put(state, optimizer, self._paused(session, untold))
        if optimizer is not session.optimizer:
            session.optimizer, session.shape = optimizer, shape
            session.checkpoints.forget_updates()
        session.other_weights = ""
        return self._restored(session, untold)

    @contextmanager
    def _paused(self, session: Session, untold: list[ApolloError]) -> Iterator[None]:
        """vLLM waits while something else than a step writes the weights.

        Args:
            untold: takes what vLLM could not be told, for the weights are as they are by then.
        """
        attachment, before = session.attachment, self._version()
        attachment.require_as_left()
        pause = EnginePause(self._owner.sidecar, attachment, session.settings.lease_seconds)
        try:
            # Somebody may have changed them before the lease began, which refuses that.
            attachment.require_live()
            yield
        finally:
            attachment.remember()
            if pause.lost:
                untold.append(pause.lost)
            try:
                version = pause.end(weights_changed=True, updates=1)
            except ApolloError as error:
                untold.append(error)
                # What the sidecar counts as well, once the lease has run out.
                version = before + 1
            self._owner.version_told(attachment.epoch, version)

    def _restored(self, session: Session, untold: list[ApolloError]) -> Restored:
        """Once the session is what was restored: the state is put on disk, then it is told.

        Raises Unavailable where the engine went, and with it what was restored.
        """
        attachment = session.attachment
        # That on disk is of what was live before.
        session.on_disk, session.captured_step = False, -1
        if any(engine_is_gone(error) for error in untold):
            attachment.lost.set()
        if not attachment.alive:
            raise _lost()
        self._board.update(session.show)
        warnings = [_not_resumed(error, session.settings.lease_seconds) for error in untold[-1:]]
        if error := session.save(self._owner.saver):
            warnings.append(_not_saved(error))
        written = sum(p.nbytes for p in attachment.parameters().values())
        return Restored(self._version(), session.optimizer.step_count, written, warnings)


def _lost() -> Unavailable:
    return Unavailable(
        "vLLM went as soon as its weights were written, and they are gone with it. The model "
        "directory and the Apollo state on disk are as they were. Start vLLM again, then restore "
        "a snapshot.",
        reason="ENGINE_LOST",
    )


def _not_resumed(error: ApolloError, seconds: float) -> training_pb2.Warning:
    message = (
        f"Weights and Apollo state are the restored ones, but vLLM was not resumed as it should "
        f"be: {error.message} It goes on by itself, with its caches dropped, in at most "
        f"{seconds:g} s; a run that comes earlier is refused. If it does not, its log says why."
    )
    log.warning("%s (%s)", message, error.reason)
    return training_pb2.Warning(reason="ENGINE_NOT_RESUMED", message=message)


def _not_saved(error: str) -> training_pb2.Warning:
    message = (
        f"Weights and Apollo state are the restored ones, but the state could not be put on disk "
        f"({error}). A server that is killed before the next run begins refuses to go on until a "
        "restore. Make room in the server's state folder: the next run, or the server's end, "
        "saves it."
    )
    log.warning("%s", message)
    return training_pb2.Warning(reason="STATE_NOT_SAVED", message=message)


def find_snapshot(session: Session, snapshot: str) -> SnapshotInfo:
    """A snapshot by its id or its name. Raises NotFound, or DataLoss where it cannot be read."""
    store = session.checkpoints.store
    return store.get(store.id_of(snapshot))


def _pass_on(future: Future[Any], done: Future[Any]) -> None:
    error = future.exception()
    if error is None:
        done.set_result(future.result())
    else:
        done.set_exception(error)


def _pass_error(begun: Future[None], done: Future[Any]) -> None:
    if error := begun.exception():
        _fail(done, error)


def _fail(done: Future[Any], error: BaseException) -> None:
    # One that was cancelled while it waited has its end.
    with suppress(InvalidStateError):
        done.set_exception(error)

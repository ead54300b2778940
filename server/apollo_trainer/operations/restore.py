"""Restores a snapshot into the live model, or takes updates back. On the training thread."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from apollo_grpc.errors import ApolloError, OutOfRange, Unavailable
from apollo_grpc.v1 import training_pb2
from apollo_trainer.checkpoints.snapshots import SnapshotInfo
from apollo_trainer.engine import (
    EnginePause,
    ModelOwner,
    Session,
    StatusBoard,
    engine_is_gone,
    version_changed,
)
from apollo_trainer.operations.job import Job
from apollo_trainer.training.options import StateShape

log = logging.getLogger(__name__)
MAX_UNDO = 10_000


@dataclass(frozen=True)
class Restored:
    """The result of a restore or an undo.

    Attributes:
        warnings: what went wrong once the weights were written.
    """

    weight_version: int
    optimizer_step: int
    bytes_written: int
    warnings: list[training_pb2.Notice]


class Restore:
    """One restore or undo.

    Args:
        expected_version: of the live weights; None for any.

    Raises Aborted where they have another version.
    """

    def __init__(
        self, session: Session, owner: ModelOwner, board: StatusBoard, expected_version: int | None
    ):
        self._session, self._owner, self._board = session, owner, board
        # What vLLM could not be told once the weights were written.
        self._untold: list[ApolloError] = []
        require_version(session, expected_version)

    def snapshot(self, snapshot: str, job: Job[Restored]) -> Restored:
        """Puts a snapshot, by id or name, into the live model."""
        session, info = self._session, find_snapshot(self._session, snapshot)
        job.progress(0, info.weights_bytes, "decoding and verifying")
        state = session.checkpoints.load(info.id)
        shape = StateShape(**state.extra["shape"])
        same = shape == session.shape
        optimizer = session.optimizer if same else session.new_optimizer(shape)
        try:
            job.progress(0, info.weights_bytes, "writing")
            # From the first weight that is written on it is finished, or taken back by itself.
            job.close()
            session.checkpoints.put(state, optimizer, self._paused())
        except BaseException:
            if not same:
                session.attachment.ranks.tell("former_optimizer")
            raise
        if not same:
            session.optimizer, session.shape = optimizer, shape
            session.checkpoints.forget_updates()
        session.other_weights = ""
        return self._end()

    def undo(self, updates: int, job: Job[Restored]) -> Restored:
        """Takes the last updates back."""
        job.close()
        if not 0 < updates <= MAX_UNDO:
            raise OutOfRange(
                f"{updates} updates cannot be taken back; nothing was changed.",
                reason="UNDO_OUT_OF_RANGE",
            )
        session = self._session
        session.checkpoints.undo(updates, session.optimizer, self._paused())
        return self._end()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Pauses vLLM while the block writes the weights."""
        session, attachment = self._session, self._session.attachment
        before = session.weight_version
        attachment.require_as_left()
        pause = EnginePause(self._owner.sidecar, attachment, session.settings.lease_seconds)
        try:
            # Somebody may have changed them before the lease began, which refuses that.
            attachment.require_live()
            yield
        finally:
            attachment.remember()
            if pause.lost:
                self._untold.append(pause.lost)
            try:
                version = pause.end(weights_changed=True, updates=1)
            except ApolloError as error:
                self._untold.append(error)
                # What the sidecar counts as well, once the lease has run out.
                version = before + 1
            session.count_version(version)
            self._board.show_version(session)

    def _end(self) -> Restored:
        """Puts the state of the restored session on disk.

        Raises Unavailable where the engine went, and with it what was restored.
        """
        session, attachment = self._session, self._session.attachment
        # That on disk is of what was live before.
        session.on_disk, session.captured_step = False, -1
        if any(engine_is_gone(error) for error in self._untold):
            attachment.lost.set()
        if not attachment.alive:
            raise _lost()
        self._board.show(session)
        seconds = session.settings.lease_seconds
        warnings = [_not_resumed(error, seconds) for error in self._untold[-1:]]
        if error := session.save(self._owner.saver):
            warnings.append(_not_saved(error))
        written = sum(p.nbytes for p in attachment.parameters().values())
        return Restored(session.weight_version, session.optimizer.step_count, written, warnings)


def require_version(session: Session, expected: int | None) -> None:
    """Raises Aborted where the live weights have another version than the expected one."""
    if expected not in (None, session.weight_version):
        raise version_changed(session.weight_version, expected)


def find_snapshot(session: Session, snapshot: str) -> SnapshotInfo:
    """Finds a snapshot by id or name. Raises NotFound, or DataLoss where it cannot be read."""
    store = session.checkpoints.store
    return store.get(store.id_of(snapshot))


def _lost() -> Unavailable:
    return Unavailable(
        "vLLM went as soon as its weights were written, and they are gone with it. The model "
        "directory and the Apollo state on disk are as they were. Start vLLM again, then restore "
        "a snapshot.",
        reason="ENGINE_LOST",
    )


def _not_resumed(error: ApolloError, seconds: float) -> training_pb2.Notice:
    message = (
        f"Weights and Apollo state are the restored ones, but vLLM was not resumed as it should "
        f"be: {error.message} It goes on by itself, with its caches dropped, in at most "
        f"{seconds:g} s; a run that comes earlier is refused. If it does not, its log says why."
    )
    log.warning("%s (%s)", message, error.reason)
    return training_pb2.Notice(reason="ENGINE_NOT_RESUMED", message=message)


def _not_saved(error: str) -> training_pb2.Notice:
    message = (
        f"Weights and Apollo state are the restored ones, but the state could not be put on disk "
        f"({error}). A server that is killed before the next run begins refuses to go on until a "
        "restore. Make room in the server's state folder: the next run, or the server's end, "
        "saves it."
    )
    log.warning("%s", message)
    return training_pb2.Notice(reason="STATE_NOT_SAVED", message=message)

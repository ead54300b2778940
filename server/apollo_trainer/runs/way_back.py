"""The way back of a run that is kept only if it is accepted: a snapshot, and a mark that says so.

The mark is on disk from before the first write until the run was accepted, or taken back. A server
that is killed in between leaves it: the next one ends the run by it, and takes it back as soon as
it is attached to the same engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict

from apollo_grpc.errors import ApolloError, FailedPrecondition, NotFound
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.checkpoints.apollo_state import Covered
from apollo_trainer.checkpoints.disk import Mark
from apollo_trainer.engine import ModelOwner, Session, StatusBoard
from apollo_trainer.operations import Job, Restore, Restored

log = logging.getLogger(__name__)
MARK = "way-back.json"
_LOOK_SECONDS = 0.1


class WayBack:
    """What one run goes back to. Training thread.

    Args:
        require_going: called while it waits for the disk; what it raises ends the run.
    """

    def __init__(
        self,
        session: Session,
        owner: ModelOwner,
        board: StatusBoard,
        run_id: str,
        require_going: Callable[[], None],
    ):
        self._session, self._owner, self._board = session, owner, board
        self._run_id, self._require_going = run_id, require_going
        self._mark = Mark(session.state_path.with_name(MARK))
        self._snapshot = ""

    def begin(self) -> None:
        """Keeps weights and state on disk, before the run changes either.

        Raises FailedPrecondition with NO_WAY_BACK where that cannot be done.
        """
        session = self._session
        session.require_sound()
        try:
            self._wait(session.checkpoints.snapshot_at_work)
            name = f"before-run-{self._run_id}"
            taken = session.checkpoints.snapshot(session.optimizer, session.extra(), name)
            self._wait(taken)
            self._snapshot = taken.result().id
            self._mark.write(self._contents(_killed(), taken_back=False))
        except OSError as error:
            raise FailedPrecondition(
                f"What the run would go back to cannot be kept ({error}); nothing was trained. "
                "Make room, then send the run again, or send it without accept_if.",
                reason="NO_WAY_BACK",
            ) from error

    def _wait(self, written: Any) -> None:
        while written is not None and not written.done():
            self._require_going()
            with suppress(NotYet):
                written.exception(timeout=_LOOK_SECONDS)

    def take(self, finished: pb.RunEvent.Finished) -> Restored | None:
        """Puts back what was before the run; None where the engine went, and the weights with it.

        Args:
            finished: what a server that is killed meanwhile leaves as the run's end.

        Raises as a restore does; the next server tries again then.
        """
        told = self._contents(finished, taken_back=False)
        self._mark.write(told)
        if not self._session.attachment.alive:
            return None
        restored = _restore(self._session, self._owner, self._board, told)
        self._mark.write(self._contents(finished, taken_back=True))
        return restored

    def forget(self) -> None:
        """The run is kept: what it would have gone back to is not needed."""
        self._mark.remove()
        self.forget_snapshot()

    def forget_snapshot(self) -> None:
        """Once the run was taken back; the mark tells how it ended until the ledger does."""
        _delete(self._session, self._snapshot)

    def _contents(self, finished: pb.RunEvent.Finished, *, taken_back: bool) -> dict[str, Any]:
        return {
            "run": self._run_id,
            "epoch": self._session.attachment.epoch,
            "snapshot": self._snapshot,
            "taken_back": taken_back,
            "finished": MessageToDict(finished),
        }


def _marks(state_dir: Path) -> Iterator[tuple[Mark, dict[str, Any]]]:
    """Those of all models that can be read, and what they say."""
    marks = [Mark(path) for path in state_dir.glob(f"models/*/{MARK}")]
    return ((mark, told) for mark in marks if "run" in (told := mark.read()))


def ends_in(state_dir: Path) -> dict[str, pb.RunEvent.Finished]:
    """How runs end that a killed server left with a way back, by their ids."""
    return {
        told["run"]: ParseDict(told["finished"], pb.RunEvent.Finished())
        for _, told in _marks(state_dir)
    }


def settle(state_dir: Path, run_id: str) -> None:
    """The ledger has the end of a run: the mark of one that was taken back is not needed."""
    for mark, told in _marks(state_dir):
        if (told["run"], told["taken_back"]) == (run_id, True):
            mark.remove()


def finish(session: Session, owner: ModelOwner, board: StatusBoard) -> bool:
    """Takes back the run that an earlier server left in the middle; returns whether it did so.

    Training thread, with a new session, before any run.
    """
    mark = Mark(session.state_path.with_name(MARK))
    told = mark.read()
    if "run" not in told:
        return False
    # The steps of another engine's run went with it.
    left = told["epoch"] == session.attachment.epoch and not told["taken_back"]
    try:
        if left:
            _restore(session, owner, board, told)
        _delete(session, told["snapshot"])
    except (ApolloError, OSError) as error:
        log.error("run %s was not taken back: %s", told["run"], error)
        why = f"run {told['run']} was to be taken back, and that failed ({error})."
        session.checkpoints.doubt(why)
    mark.remove()
    return left


def _restore(
    session: Session, owner: ModelOwner, board: StatusBoard, told: dict[str, Any]
) -> Restored:
    # The state that is saved then knows of no step of the run.
    session.covered = Covered(told["run"], 0)
    restored = Restore(session, owner, board, None).snapshot(
        told["snapshot"], Job[Restored](lambda *_: None)
    )
    session.from_disk = session.moved = False
    return restored


def _delete(session: Session, snapshot: str) -> None:
    try:
        session.checkpoints.store.delete(snapshot)
    except (NotFound, OSError) as error:
        log.warning("the snapshot %s stays: %s", snapshot, error)


def _killed() -> pb.RunEvent.Finished:
    return pb.RunEvent.Finished(
        state=pb.RUN_STATE_FAILED,
        failure=pb.Notice(
            reason="INTERRUPTED",
            message="The training server ended during this run, which was to be kept only if it "
            "was accepted: its updates are taken back. Send the run again.",
        ),
    )

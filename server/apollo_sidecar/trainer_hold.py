"""One training server at a time: two would write with moments of each other's weights."""

from __future__ import annotations

import threading
from collections.abc import Callable

from apollo_grpc.errors import FailedPrecondition


class TrainerHold:
    """An engine is the first training server's that watches it, until its last watch ends.

    Whoever gives no id holds nothing, and may write only while nobody holds. Any thread.

    Args:
        ended: called when the last watch of a training server has ended.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        self._lock, self._ended = threading.Lock(), ended
        self._holder, self._watches = "", 0

    def watch(self, trainer_id: str) -> Callable[[], None]:
        """Takes the engine, or takes it once more; what comes back gives that up.

        Raises FailedPrecondition while another training server has it.
        """
        if not trainer_id:
            return lambda: None
        with self._lock:
            self._require(trainer_id)
            self._holder, self._watches = trainer_id, self._watches + 1
        return self._let_go

    def _let_go(self) -> None:
        with self._lock:
            self._watches -= 1
            if self._watches:
                return
            self._holder = ""
        self._ended()

    def require(self, trainer_id: str) -> None:
        """Raises FailedPrecondition where a write would be beside another training server's."""
        with self._lock:
            self._require(trainer_id)

    def _require(self, trainer_id: str) -> None:
        if self._holder not in ("", trainer_id):
            raise FailedPrecondition(
                "Another training server trains this engine; nothing was done. Stop that one "
                "first: the next one takes over by itself.",
                reason="ENGINE_HELD",
            )

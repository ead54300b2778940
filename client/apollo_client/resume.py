"""Events of runs without a gap or a repeat, over lost connections and restarts of the server.

What to ask next, and whether to ask again, decided once for both clients.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from apollo_client.connection import message
from apollo_client.placing import Places, in_user_words
from apollo_grpc.errors import ApolloError, DataLoss, Unavailable
from apollo_grpc.v1 import training_pb2 as pb

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 2.0
UNREACHABLE, STOPPING = "SERVER_UNREACHABLE", "SERVER_STOPPING"
_NOT_ATTACHED = "ENGINE_NOT_ATTACHED"
# How grpc says that the request never left.
_NOT_SENT = "failed to connect"


class Patience:
    """For how long, and how often, a call is made again that a server refused for now.

    Args:
        seconds: without an answer; 0: not at all.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._broken_at: float | None = None
        self._wait = FIRST_WAIT_SECONDS
        self._heard = False

    def heard(self) -> None:
        """An answer came: the time begins anew."""
        self._heard, self._broken_at, self._wait = True, None, FIRST_WAIT_SECONDS

    def wait_after(self, error: ApolloError | None) -> float:
        """Seconds to wait before asking again; None is a stream that ended too early.

        Raises the error where asking again makes no sense, or was tried for long enough.
        """
        error = error or Unavailable("The stream ended before the run did.", reason=UNREACHABLE)
        now = time.monotonic()
        if not self._is_passing(error):
            raise error
        self._broken_at = self._broken_at or now
        left = self._broken_at + self._seconds - now
        if left <= 0:
            raise error
        # Everybody who was refused was told the same time.
        wait = min(left, max(self._wait, error.retry_seconds) * random.uniform(0.5, 1.0))
        self._wait = min(LONGEST_WAIT_SECONDS, self._wait * 2)
        return wait

    def _is_passing(self, error: ApolloError) -> bool:
        """Whether nothing was done, and the server says when it can be."""
        return error.retry_seconds > 0 and not self._heard


class Endurance(Patience):
    """Patience with a server that was heard already, too: it may be back."""

    def _is_passing(self, error: ApolloError) -> bool:
        """Whether the server may be back: a request that it may have had is asked for again."""
        if error.retry_seconds:
            return True
        if not isinstance(error, Unavailable):
            return False
        if self._heard or self._broken_at or error.reason == STOPPING:
            return True
        cause: Any = error.metadata.get("cause", "")
        return error.reason == UNREACHABLE and _NOT_SENT not in cause


class OperationEndurance(Endurance):
    """Endurance with a server that goes away, and comes back before it has attached vLLM again.

    What an engine refuses is the call's own end: another one may have weights of another day.
    """

    def _is_passing(self, error: ApolloError) -> bool:
        """Whether the call, which has an id, can go on where it was."""
        if error.reason == _NOT_ATTACHED:
            return self._broken_at is not None
        gone = error.retry_seconds > 0 or error.reason in (UNREACHABLE, STOPPING)
        return gone and super()._is_passing(error)


class Resume(Endurance):
    """Where a reader of one run is.

    Args:
        request: that began the run, or asked for its events.
        seconds: for how long without an event a lost server is looked for; 0: not at all.
        places: where the request's samples come from, for what a refusal names.

    Attributes:
        run_id: of the run, once it is known.
        ended: the run's last event was had.
    """

    def __init__(
        self,
        request: pb.TrainRequest | pb.WatchRunRequest,
        seconds: float,
        places: Places | None = None,
    ):
        super().__init__(seconds)
        self._places = places or {}
        self._request, self.run_id, self._last = request, "", 0
        if isinstance(request, pb.WatchRunRequest):
            self.run_id, self._last = request.run_id, request.after_sequence
        self.ended = False

    def request(self) -> pb.TrainRequest | pb.WatchRunRequest:
        """What to ask now: `Train` until the run is known, and then `WatchRun`."""
        if self.run_id:
            return pb.WatchRunRequest(run_id=self.run_id, after_sequence=self._last)
        return self._request

    def call(self, begin: Callable[[Any, Any], Any], stub: Any) -> Any:
        """Begins the call that asks so.

        Args:
            begin: given a method of the stub and a request.
        """
        request = self.request()
        known = isinstance(request, pb.WatchRunRequest)
        return begin(stub.WatchRun if known else stub.Train, request)

    def take(self, event: pb.RunEvent) -> bool:
        """Whether an event is the next one; one that was had already is not.

        Raises DataLoss where events are missing before it.
        """
        self.heard()
        if event.sequence <= self._last:
            return False
        if event.sequence != self._last + 1:
            raise DataLoss(
                f"The events {self._last + 1} to {event.sequence - 1} of run {event.run_id} did "
                "not come. The run itself goes on; 'apollo run' shows it.",
                reason="EVENTS_MISSING",
            )
        self.run_id, self._last = event.run_id, event.sequence
        self.ended = event.HasField("finished")
        return True

    def wait_after(self, error: ApolloError | None) -> float:
        """The same; what is raised names the samples as their writer does."""
        return super().wait_after(error and in_user_words(error, self._places))


class RunsResume(Endurance):
    """Where a reader of all runs is.

    Args:
        after: the revision of the last event that is known; None: from now on.
        seconds: for how long a lost server is looked for; 0: not at all.
    """

    ended = False

    def __init__(self, after: int | None, seconds: float):
        super().__init__(seconds)
        self._request = message(pb.WatchRunsRequest, after_revision=after)
        self._told = False

    def call(self, begin: Callable[[Any, Any], Any], stub: Any) -> Any:
        """Begins the call that asks for what comes next."""
        return begin(stub.WatchRuns, self._request)

    def take(self, response: pb.WatchRunsResponse) -> bool:
        """Whether a message is news: a later one, or the first of all."""
        self.heard()
        first, self._told = not self._told, True
        later = response.revision > self._request.after_revision
        if first or later:
            self._request = pb.WatchRunsRequest(after_revision=response.revision)
        return first or (later and response.HasField("event"))

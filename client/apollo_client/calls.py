# Generated from aio_calls.py by `make protos`: change that file, not this one.
"""Calls about runs and status; the client that they are part of says how one is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Unpack

from apollo_client.connection import STATUS_SECONDS, message
from apollo_client.data import Columns, Samples
from apollo_client.lifetime import Lifetime
from apollo_client.placing import Places, in_user_words
from apollo_client.requests import (
    RunOptions,
    create_request,
    delete_probes_request,
    list_request,
    placed_spec,
    train_request,
    watch_request,
)
from apollo_client.resume import Patience, Resume, RunsResume
from apollo_client.streams import RunsStream, RunStream, Stream
from apollo_grpc.errors import ApolloError
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import status_pb2, training_pb2
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub


class Calls:
    """What calls of every kind need."""

    _endpoint: Endpoint
    _lifetime: Lifetime
    _retry_seconds: float

    def _stream(
        self, method: Any, request: Any, patience: type[Patience] = Patience
    ) -> Stream[Any]:
        return Stream(
            partial(self._begin, method, request),
            patience(self._retry_seconds),
            self._endpoint,
            self._lifetime,
            lambda response: response,
        )

    def _begin(self, method: Any, request: Any, **options: Any) -> Any:
        raise NotImplementedError

    def _answer(self, method: Any, request: Any, seconds: float | None = STATUS_SECONDS) -> Any:
        """The answer of a unary call, which may take so many seconds, or any number for None."""
        raise NotImplementedError

    def _asked(self, method: Any, request: Any, places: Places) -> Any:
        """The answer, however long it takes; a refusal names the samples as their writer does."""
        try:
            return self._answer(method, request, None)
        except ApolloError as error:
            raise in_user_words(error, places) from None


class RunCalls(Calls):
    """Runs, the probes that they left, and the server's status."""

    _training: TrainingServiceStub
    _status: StatusServiceStub

    def train(
        self,
        samples: Samples = (),
        *,
        columns: Columns = None,
        request_id: str | None = None,
        **options: Unpack[RunOptions],
    ) -> RunStream:
        """Starts a run and returns its events; the last one is `finished`.

        The run begins now, and goes on when the stream is left. A run that fails raises nothing:
        its `finished` event says so, and so does `result()`. A step's loss is in `event.step.loss`.

        Args:
            samples: a list or anything else to iterate of what `to_sample` takes, a dataset of
                Hugging Face as well; the path of a file, which is read now, by `read_samples`; a
                DataFrame of pandas. None where `dataset_id` names what `create_dataset` brought.
            columns: names of keys in the samples and evaluation samples, as
                `{"prompt": "question", "completion": "answer"}`; their other keys are left out.
            request_id: the same id with the same spec attaches to the first run, also after a
                restart of either side; with another spec it raises AlreadyExists. None: a new one.
        """
        spec, places = placed_spec(samples, options, columns)
        return self._follow(train_request(spec, request_id, places), places)

    def train_spec(self, spec: training_pb2.RunSpec, *, request_id: str | None = None) -> RunStream:
        """Starts a run as `train` does, of a spec that the caller built."""
        return self._follow(train_request(spec, request_id))

    def create_run(
        self,
        samples: Samples = (),
        *,
        columns: Columns = None,
        request_id: str | None = None,
        **options: Unpack[RunOptions],
    ) -> training_pb2.Run:
        """Starts a run as `train` does, and returns it once it is on the server's disk.

        With a `request_id` of yours a call that broke can be made again: it is the same run.
        """
        spec, places = placed_spec(samples, options, columns)
        request = create_request(spec, request_id, places)
        answer = self._asked(self._training.CreateRun, request, places)
        run: training_pb2.Run = answer.run
        return run

    def watch_run(self, run_id: str, after_sequence: int = 0) -> RunStream:
        """The events of a run after a sequence, until it has finished.

        Its `result()` waits for the end of a run that somebody else began.

        Raises NotFound for a run that is not known, OutOfRange for events that were pruned.
        """
        request = message(
            training_pb2.WatchRunRequest, run_id=run_id, after_sequence=after_sequence
        )
        return self._follow(request)

    def watch_runs(self, after_revision: int | None = None) -> RunsStream:
        """The events of all runs after a revision, in the order in which they reached the disk.

        It does not end by itself. The first message has no event where there is none to send yet,
        and tells the revision of now.

        Args:
            after_revision: of the last message that is known; 0: all that is kept; None: from now.

        Raises OutOfRange for events that were pruned; its metadata has `first_revision`, from which
        on all are kept.
        """
        resume = RunsResume(after_revision, self._retry_seconds)
        return RunsStream(self._begin, self._training, resume, self._endpoint, self._lifetime)

    def get_run(self, run_id: str, *, samples: bool = False) -> training_pb2.Run:
        """One run. Raises NotFound for one that is not known.

        Args:
            samples: its spec has its samples, anchors and probes, as long as they are kept.
        """
        view = training_pb2.RUN_VIEW_FULL if samples else training_pb2.RUN_VIEW_BASIC
        request = message(training_pb2.GetRunRequest, run_id=run_id, view=view)
        answer = self._answer(self._training.GetRun, request)
        run: training_pb2.Run = answer.run
        return run

    def list_runs(
        self,
        page_size: int = 0,
        page_token: str = "",
        states: Iterable[str | int] = (),
        *,
        labels: Mapping[str, str] | None = None,
        name: str = "",
        oldest_first: bool = False,
    ) -> training_pb2.ListRunsResponse:
        """A page of runs, newest first, their specs without samples.

        Args:
            page_token: `next_page_token` of the page before, for the same choice of runs.
            states: only runs in one of these, such as `"FAILED"`; empty means all.
            labels: only runs that have all of these.
            name: only runs of this name; empty means all.
        """
        request = list_request(page_size, page_token, states, labels, name, oldest_first)
        page: training_pb2.ListRunsResponse = self._answer(self._training.ListRuns, request)
        return page

    def cancel_run(self, run_id: str) -> training_pb2.Run:
        """Asks a run to stop, and returns at once; a run that has ended stays as it ended."""
        request = message(training_pb2.CancelRunRequest, run_id=run_id)
        answer = self._answer(self._training.CancelRun, request)
        run: training_pb2.Run = answer.run
        return run

    def delete_run(self, run_id: str) -> None:
        """Deletes a run that has ended: its spec, its samples and its events.

        Raises NotFound for one that is not known, FailedPrecondition for one that has not ended.
        """
        request = message(training_pb2.DeleteRunRequest, run_id=run_id)
        self._answer(self._training.DeleteRun, request)

    def list_regression_probes(
        self, page_size: int = 0, page_token: str = ""
    ) -> training_pb2.ListRegressionProbesResponse:
        """A page of the probes that accepted runs left with the model, by name."""
        request = message(
            training_pb2.ListRegressionProbesRequest, page_size=page_size, page_token=page_token
        )
        page: training_pb2.ListRegressionProbesResponse = self._answer(
            self._training.ListRegressionProbes, request
        )
        return page

    def delete_regression_probes(self, names: Iterable[str] | None) -> int:
        """Takes probes out of the regression set, or all of them for None; returns how many.

        Names that are not there are left out.
        """
        request = delete_probes_request(names)
        if names is not None and not request.names:
            return 0  # To the server no names are all names.
        answer = self._answer(self._training.DeleteRegressionProbes, request)
        return int(answer.deleted)

    def status(self) -> status_pb2.ServerStatus:
        """How the server is now."""
        request = status_pb2.GetStatusRequest()
        answer = self._answer(self._status.GetStatus, request)
        status: status_pb2.ServerStatus = answer.status
        return status

    def watch(
        self, run_id: str = "", min_interval: float = 0.0
    ) -> Stream[status_pb2.WatchStatusResponse]:
        """The status first, then events of runs and changes of status, as they happen.

        Args:
            run_id: only events of this run; empty means all.
            min_interval: seconds between two statuses; events are not held back.
        """
        request = watch_request(run_id, min_interval)
        return self._stream(self._status.WatchStatus, request)

    def _follow(
        self,
        request: training_pb2.TrainRequest | training_pb2.WatchRunRequest,
        places: Places | None = None,
    ) -> RunStream:
        resume = Resume(request, self._retry_seconds, places)
        return RunStream(self._begin, self._training, resume, self._endpoint, self._lifetime)

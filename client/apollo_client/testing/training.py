"""TrainingService of a fake server."""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from typing import Any

from apollo_client.testing.checks import check_request_id, check_spec, tokens_of
from apollo_client.testing.memory import KeptRun, Memory, not_found
from apollo_client.testing.paging import page_of, refuse, wrong_page, wrong_states
from apollo_client.testing.playing import steps_in
from apollo_grpc.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    OutOfRange,
    Quota,
    Resource,
    ResourceExhausted,
)
from apollo_grpc.times import now
from apollo_grpc.v1 import training_pb2 as pb


class Training:
    """Each method is an RPC by its name; the lock is theirs to take."""

    def __init__(self, memory: Memory):
        self._memory = memory

    # --- taking runs --------------------------------------------------------------------------

    def train(self, request: pb.TrainRequest, context: Any) -> Iterator[pb.TrainResponse]:
        """Events of a run from the first on."""
        for event in self._events(self._submit(request), 0, context):
            yield pb.TrainResponse(event=event)

    def create_run(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunResponse:
        """The run, once it waits."""
        return pb.CreateRunResponse(run=_basic(self._submit(request).run))

    def validate_run(self, request: pb.ValidateRunRequest, context: Any) -> pb.ValidateRunResponse:
        """What a spec comes to."""
        samples = self._checked(request)
        counts = [tokens_of(sample) for sample in samples]
        return pb.ValidateRunResponse(
            steps_total=steps_in(request.spec, samples),
            context_tokens=sum(each.context_tokens for each in counts),
            continuation_tokens=sum(each.continuation_tokens for each in counts),
            longest_sample_tokens=max(c.context_tokens + c.continuation_tokens for c in counts),
        )

    def _submit(self, request: pb.TrainRequest | pb.CreateRunRequest) -> KeptRun:
        check_request_id(request.request_id)
        with self._memory.changed:
            for kept in self._memory.runs.values():
                if request.request_id and kept.run.request_id == request.request_id:
                    return _same(kept, request.spec)
            return self._queue(request, self._checked(request))

    def _queue(
        self, request: pb.TrainRequest | pb.CreateRunRequest, samples: list[pb.Sample]
    ) -> KeptRun:
        memory = self._memory
        run = pb.Run(
            run_id=uuid.uuid4().hex,
            state=pb.RUN_STATE_QUEUED,
            spec=request.spec,
            create_time=now(),
            steps_total=steps_in(request.spec, samples),
            request_id=request.request_id,
        )
        kept = memory.runs[run.run_id] = KeptRun(memory.number(), run, samples)
        runs = [job for job in (memory.active, *memory.jobs) if isinstance(job, KeptRun)]
        ahead = [each for each in runs if not each.has_ended]
        memory.jobs.append(kept)
        memory.append(kept, queued=pb.RunEvent.Queued(position=len(ahead)))
        return kept

    def _checked(self, request: Any) -> list[pb.Sample]:
        """The samples of a spec that is taken. Raises what it is refused by."""
        if not request.HasField("spec"):
            raise InvalidArgument.at("spec", "is missing")
        spec, memory = request.spec, self._memory
        with memory.changed:
            samples = list(spec.samples)
            if spec.dataset_id:
                if spec.dataset_id not in memory.datasets:
                    raise not_found("dataset", spec.dataset_id)
                samples = memory.datasets[spec.dataset_id].samples
            check_spec(spec, samples)
            memory.require_version(spec, may_rise=True)
            self._require_room()
        return samples

    def _require_room(self) -> None:
        waiting = [job for job in self._memory.jobs if isinstance(job, KeptRun)]
        most = self._memory.max_queued_runs
        if len(waiting) >= most:
            raise ResourceExhausted(
                f"{len(waiting)} runs are waiting, which is the limit; nothing was queued. Try "
                "again when some have ended.",
                reason="QUEUE_FULL",
                quota=Quota("queued_runs", f"at most {most}"),
            )

    # --- reading events -----------------------------------------------------------------------

    def watch_run(self, request: pb.WatchRunRequest, context: Any) -> Iterator[pb.WatchRunResponse]:
        """Events of a run after a sequence."""
        _require_id(request)
        if request.after_sequence < 0:
            raise InvalidArgument.at("after_sequence", "must not be negative")
        kept = self._memory.run(request.run_id)
        if kept.has_ended and request.after_sequence > len(kept.events):
            words = f"The run ended with event {len(kept.events)}."
            raise OutOfRange(words, reason="BEYOND_THE_END")
        for event in self._events(kept, request.after_sequence, context):
            yield pb.WatchRunResponse(event=event)

    def _events(self, kept: KeptRun, after: int, context: Any) -> Iterator[pb.RunEvent]:
        while news := self._news(kept, after, context):
            yield from news
            after += len(news)

    def _news(self, kept: KeptRun, after: int, context: Any) -> list[pb.RunEvent]:
        """Events after a sequence, once there are some; none where none will come."""
        with self._memory.changed:
            events = kept.events
            self._memory.wait(lambda: len(events) > after or kept.has_ended, context)
            return events[after:] if context.is_active() else []

    def watch_runs(
        self, request: pb.WatchRunsRequest, context: Any
    ) -> Iterator[pb.WatchRunsResponse]:
        """Events of all runs after a revision."""
        memory, after = self._memory, request.after_revision
        if after < 0:
            raise InvalidArgument.at("after_revision", "must not be negative")
        newest = memory.revision
        if after > newest:
            words = f"The newest revision is {newest}."
            told = {"newest_revision": str(newest)}
            raise OutOfRange(words, reason="BEYOND_THE_END", metadata=told)
        if not request.HasField("after_revision") or not self._after(after):
            after = newest
            yield pb.WatchRunsResponse(revision=newest)
        while True:
            with memory.changed:
                if not memory.wait(partial(self._after, after), context):
                    return
                news, after = self._after(after), memory.revision
            for revision, event in news:
                yield pb.WatchRunsResponse(revision=revision, event=event)

    def _after(self, revision: int) -> list[tuple[int, pb.RunEvent]]:
        with self._memory.changed:
            log = self._memory.log
            return log[bisect_right(log, revision, key=lambda each: each[0]) :]

    # --- runs ---------------------------------------------------------------------------------

    def get_run(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        """One run."""
        _require_id(request)
        if request.view not in pb.RunView.values():
            raise InvalidArgument.at("view", f"is {request.view}, which is no view")
        with self._memory.changed:
            run = self._memory.run(request.run_id).run
            return pb.GetRunResponse(run=run if request.view == pb.RUN_VIEW_FULL else _basic(run))

    def list_runs(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        """A page of runs."""
        wrong = wrong_page(request) + wrong_states(request.states, pb.RunState)
        if request.order not in pb.RunOrder.values():
            wrong.append(FieldViolation("order", f"is {request.order}, which is no order"))
        refuse(wrong)
        rising = request.order == pb.RUN_ORDER_OLDEST_FIRST
        with self._memory.changed:
            chosen = [kept for kept in self._memory.runs.values() if _is_chosen(kept.run, request)]
            page, token = page_of(chosen, lambda kept: kept.number, request, rising=rising)
            runs = [_basic(kept.run) for kept in page]
        return pb.ListRunsResponse(runs=runs, next_page_token=token)

    def cancel_run(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        """Asks a run to stop; one that waits has ended by that."""
        _require_id(request)
        memory = self._memory
        with memory.changed:
            kept = memory.run(request.run_id)
            kept.cancelled = True
            if kept in memory.jobs:
                memory.jobs.remove(kept)
                ended = pb.RunEvent.Finished(state=pb.RUN_STATE_CANCELLED)
                memory.append(kept, finished=ended)
            memory.wake()
            return pb.CancelRunResponse(run=_basic(kept.run))

    def delete_run(self, request: pb.DeleteRunRequest, context: Any) -> pb.DeleteRunResponse:
        """Deletes a run that has ended."""
        _require_id(request)
        memory = self._memory
        with memory.changed:
            if not memory.run(request.run_id).has_ended:
                words = "The run has not ended; it was left as it is. Cancel it first."
                raise FailedPrecondition(words, reason="RUN_NOT_ENDED")
            del memory.runs[request.run_id]
            memory.log = [each for each in memory.log if each[1].run_id != request.run_id]
        return pb.DeleteRunResponse()


def _require_id(request: Any) -> None:
    if not request.run_id:
        raise InvalidArgument.at("run_id", "is missing")


def _same(kept: KeptRun, spec: pb.RunSpec) -> KeptRun:
    if kept.run.spec != spec:
        raise AlreadyExists(
            "This request_id began a run of another spec; nothing was done. Send a new "
            "request_id, or none.",
            reason="REQUEST_ID_TAKEN",
            metadata={"run_id": kept.run.run_id},
            resource=Resource("run", kept.run.run_id),
        )
    return kept


def _basic(run: pb.Run) -> pb.Run:
    basic = pb.Run()
    basic.CopyFrom(run)
    for owner, name in (
        (basic.spec, "samples"),
        (basic.spec, "evaluation_samples"),
        (basic.spec, "probes"),
    ):
        owner.ClearField(name)  # type: ignore[arg-type]
    if basic.spec.HasField("anchors"):
        del basic.spec.anchors.samples[:]
    return basic


def _is_chosen(run: pb.Run, request: pb.ListRunsRequest) -> bool:
    labels, missing = run.spec.labels, object()
    return (
        (not request.states or run.state in request.states)
        and (not request.name or run.spec.name == request.name)
        and all(labels.get(key, missing) == value for key, value in request.labels.items())
    )

"""StatusService of a fake server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

from google.protobuf.duration_pb2 import Duration

from apollo_client.testing.checks import MAX_LENGTH, VOCABULARY
from apollo_client.testing.memory import DIRECTORY, WEIGHT_BYTES, KeptOperation, KeptRun, Memory
from apollo_client.testing.playing import EPOCH
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.times import duration, now
from apollo_grpc.transport import MAX_MESSAGE_BYTES
from apollo_grpc.v1 import status_pb2 as pb
from apollo_grpc.v1 import training_pb2

PARAMETERS = WEIGHT_BYTES // 2
HEARTBEAT_SECONDS = 15.0
MANY = 10_000
MODES = (
    training_pb2.COHERENCE_MODE_LIVE,
    training_pb2.COHERENCE_MODE_PAUSE_STEP,
    training_pb2.COHERENCE_MODE_PAUSE_RUN,
)


class Status:
    """Each method is an RPC by its name."""

    def __init__(self, memory: Memory):
        self._memory, self._began = memory, time.monotonic()

    def get_status(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """The status now."""
        return pb.GetStatusResponse(status=self._status())

    def get_server_info(
        self, request: pb.GetServerInfoRequest, context: Any
    ) -> pb.GetServerInfoResponse:
        """What this server takes."""
        names = [field.name for field in pb.ServerLimits.DESCRIPTOR.fields]
        limits = pb.ServerLimits(**dict.fromkeys(names, MANY))
        limits.queued_runs = self._memory.max_queued_runs
        limits.message_bytes = limits.queued_bytes = MAX_MESSAGE_BYTES
        limits.dataset_bytes = MAX_MESSAGE_BYTES
        model = pb.ModelInfo(
            directory=DIRECTORY,
            architecture="FakeForCausalLM",
            vocabulary=VOCABULARY,
            max_length=MAX_LENGTH,
            dtype="bfloat16",
            parameters=PARAMETERS,
            coherence_modes=MODES,
            undoable_updates=len(self._memory.undoable),
        )
        own = version("apollo-grpc")
        return pb.GetServerInfoResponse(server_version=own, limits=limits, model=model)

    def watch_status(
        self, request: pb.WatchStatusRequest, context: Any
    ) -> Iterator[pb.WatchStatusResponse]:
        """The status, then events and each change of it."""
        if request.min_interval.ToNanoseconds() < 0:
            raise InvalidArgument.at("min_interval", "must not be negative")
        memory, told = self._memory, self._status()
        revision = memory.revision
        yield pb.WatchStatusResponse(status=told)
        while context.is_active():
            with memory.changed:
                has_news = partial(self._has_news, revision, told, context)
                memory.changed.wait_for(has_news, HEARTBEAT_SECONDS)
                news = [event for number, event in memory.log if number > revision]
                was, told, revision = told, self._status(), memory.revision
            mine = [e for e in news if request.run_id in ("", e.run_id)]
            yield from (pb.WatchStatusResponse(event=event) for event in mine)
            if _lasting(told) != _lasting(was):
                yield pb.WatchStatusResponse(status=told)
            elif not news and context.is_active():
                yield pb.WatchStatusResponse(heartbeat=pb.Heartbeat(time=now()))

    def _has_news(self, revision: int, told: pb.ServerStatus, context: Any) -> bool:
        has_left = not context.is_active()
        more = self._memory.revision > revision
        return has_left or more or _lasting(self._status()) != _lasting(told)

    def _status(self) -> pb.ServerStatus:
        memory = self._memory
        with memory.changed:
            active = memory.active
            run = active.run.run_id if isinstance(active, KeptRun) else ""
            operation = active.message.operation_id if isinstance(active, KeptOperation) else ""
            return pb.ServerStatus(
                model=DIRECTORY,
                attachment=pb.ATTACHMENT_STATE_ATTACHED,
                attachment_detail="a fake server: no model learns",
                engine_epoch=EPOCH,
                weight_version=memory.weight_version,
                active_run_id=run,
                active_operation_id=operation,
                queue_length=sum(isinstance(job, KeptRun) for job in memory.jobs),
                optimizer_loaded=True,
                optimizer_step=memory.optimizer_step,
                device_memory=pb.DeviceMemory(device="cpu"),
                last_sync=memory.last_sync if memory.generation else None,
                uptime=duration(time.monotonic() - self._began),
                weight_memory=pb.WeightMemory(parameters=PARAMETERS, shared_bytes=WEIGHT_BYTES),
                server_version=version("apollo-grpc"),
            )


def _lasting(status: pb.ServerStatus) -> pb.ServerStatus:
    """A status without what changes by itself."""
    same = pb.ServerStatus()
    same.CopyFrom(status)
    same.uptime.CopyFrom(Duration())
    return same

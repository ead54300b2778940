"""The training server's process: settings, wiring, serving, graceful stop."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sqlite3
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import NoReturn

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from apollo_grpc.errors import ApolloError, InvalidArgument
from apollo_grpc.interceptors import AioErrors
from apollo_grpc.locations import private_folder, require_usable
from apollo_grpc.standard_streams import prepare_streams
from apollo_grpc.transport import SERVER_OPTIONS, open_port
from apollo_grpc.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    status_pb2,
    status_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from apollo_trainer import logs, memory_command, recover_command
from apollo_trainer.config import Settings, read_settings
from apollo_trainer.engine import EngineWatch, ModelOwner, ServerInfo, StatusBoard, no_engine
from apollo_trainer.environment import described, unknown_names
from apollo_trainer.guards import Guards
from apollo_trainer.measured import Measured
from apollo_trainer.operations import CheckpointJobs, Operations
from apollo_trainer.runs import RunQueue
from apollo_trainer.services.allowed_folders import AllowedFolders
from apollo_trainer.services.checkpoint import CheckpointService
from apollo_trainer.services.dataset import DatasetService
from apollo_trainer.services.reflection import Reflection
from apollo_trainer.services.sample_calls import sample_turns
from apollo_trainer.services.status import StatusService
from apollo_trainer.services.streams import StreamLimit
from apollo_trainer.services.training import TrainingService
from apollo_trainer.training.kernels import delta_tiles
from apollo_trainer.watching import Ring
from apollo_trainer.weights.sidecar import Sidecar

log = logging.getLogger("apollo_trainer")
PROGRAM = "apollo-training-server"
STOP_GRACE_SECONDS = 5.0
# Of calls and watchers: what the callers of one host may take of a limit.
HOST_SHARE = 0.5
_M_ARENA_MAX = -8  # malloc.h
SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (training_pb2, "TrainingService"),
        (checkpoint_pb2, "CheckpointService"),
        (dataset_pb2, "DatasetService"),
        (status_pb2, "StatusService"),
    )
)


class TrainingServer:
    """All parts of the server on one event loop.

    Raises ApolloError when the state folder or the address cannot be had.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        require_usable(private_folder(settings.state_dir))
        self._guards = Guards(settings)
        guard = self._guards.of_address()
        calls = self._calls = StreamLimit(settings.max_calls, share=HOST_SHARE, what="calls")
        # A message of samples is as large as they come: one is read and checked at a time.
        accepting = (f"/{SERVICES[0]}/{name}" for name in ("Train", "CreateRun"))
        turns = dict.fromkeys(accepting, asyncio.Semaphore(1)) | sample_turns(SERVICES[0])
        errors = AioErrors(guard.check, lambda context: calls.one(context.peer()), turns)
        self._measured = Measured(settings, lambda: self._guards.of_tcp)
        interceptors = [*self._measured.interceptors, errors]
        self._server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        self._port = open_port(
            self._server, settings.address, guarded=bool(guard.tokens), tls=guard.tls
        )
        self._board = StatusBoard(version("apollo-grpc"), no_engine(settings.sidecar))
        self._ring = Ring(self._board)
        self._sidecar = Sidecar(settings.sidecar)
        self._owner = ModelOwner(self._sidecar, self._board, settings)
        self._queue = RunQueue(self._owner, self._board, settings)
        self._health = HealthServicer()
        jobs = self._add_services()
        self._measured.show(self._board, self._ring, self._owner, self._queue, jobs)

    def _add_services(self) -> CheckpointJobs:
        server, settings = self._server, self._settings
        work, readers = (StreamLimit(settings.max_streams) for _ in range(2))
        watchers = StreamLimit(settings.max_watchers, share=HOST_SHARE, what="watchers")
        training_pb2_grpc.add_TrainingServiceServicer_to_server(
            TrainingService(self._owner, self._queue, work, readers), server
        )
        jobs = CheckpointJobs(self._owner, self._board)
        operations = Operations(self._owner, self._board, self._queue.ledger, self._queue.writer)
        folders = AllowedFolders(self._owner, settings.export_roots)
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(
            CheckpointService(self._owner, jobs, operations, work, readers, folders), server
        )
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server(
            DatasetService(self._queue.datasets, work), server
        )
        status_pb2_grpc.add_StatusServiceServicer_to_server(
            StatusService(self._board, self._ring, watchers, ServerInfo(self._owner, settings)),
            server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        Reflection((*SERVICES, health.SERVICE_NAME)).add_to(server)
        return jobs

    async def serve(self) -> None:
        """Serves until SIGTERM or SIGINT, then stops without losing a finished step."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        self._guards.listen(asyncio.get_running_loop(), stop.set)
        await self._server.start()
        for name in ("", *SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        _set_imports_aside()
        watch = EngineWatch(self._sidecar, self._owner)
        log.info("the training server listens on %s", self._port.address)
        await stop.wait()
        log.info("stopping: the step at work is finished and the Apollo state saved")
        await self._health.enter_graceful_shutdown()
        await asyncio.to_thread(self._queue.stop)
        self._ring.close()
        await self._end_calls()
        self._queue.close()
        await asyncio.to_thread(watch.stop)
        await asyncio.to_thread(self._measured.stop)
        self._port.release()

    async def _end_calls(self) -> None:
        """Lets callers read how their calls ended, those of them that read.

        grpc closes a connection once the caller has answered a ping that follows what was sent
        before the stop. What is sent after it may be lost with the connection.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + STOP_GRACE_SECONDS
        await self._calls.none_left(STOP_GRACE_SECONDS)
        await self._server.stop(max(0.0, end - clock()))


def _set_imports_aside() -> None:
    """Takes what was imported out of the garbage collector's sight.

    A refused call leaves a cycle behind in grpc.aio, its request within. Beside the objects of
    torch those are few: whole collections come so rarely that they add up to tens of megabytes.
    Only before an engine is attached: what is frozen is never let go of.
    """
    gc.collect()
    gc.freeze()
    # The next whole collection comes once a quarter of what this one leaves has been added.
    gc.collect()


def _share_one_heap() -> None:
    """Has all threads allocate from one heap, where libc can (mallopt(3)).

    grpc reads a message on any of its threads, and glibc gives each a heap that keeps what was
    freed in it: an upload of 2 MB messages then holds 15 to 50 MB of them, and 7 to 17 in one heap.
    """
    if (tune := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        tune(_M_ARENA_MAX, 1)


async def _serve(settings: Settings) -> None:
    await TrainingServer(settings).serve()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `apollo-training-server`; exits with 2 for wrong settings, 1 when refused.

    `recover DIRECTORY` in place of settings settles a cut-off sync, `memory DIRECTORY` tells what a
    step needs of a GPU; both serve nothing.
    """
    prepare_streams()
    # What is wrong with settings is told before they are read.
    logs.begin("json" if os.environ.get("APOLLO_LOG_FORMAT") == "json" else "text")
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _require_known(os.environ)
        for each in (recover_command, memory_command):
            if given[:1] == [each.NAME]:
                sys.exit(each.command(PROGRAM, given[1:]))
        settings = read_settings(given)
        logs.begin(settings.log_format, settings.log_level)
        for line in described(settings, os.environ, given):
            log.info("setting %s", line)
        # Kernels that were compiled outlive the process, beside the state and in no home folder.
        kernels = private_folder(settings.state_dir) / "kernels"
        os.environ.setdefault("TRITON_CACHE_DIR", str(kernels))
        delta_tiles.settle(kernels / "delta-rule")
        _share_one_heap()
        asyncio.run(_serve(settings))
    except InvalidArgument as error:
        _end(2, error.message)
    except ApolloError as error:
        _end(1, error.message)
    except (OSError, sqlite3.Error) as error:
        _end(1, f"the system refused: {error}. What was on disk is kept; start again.")


def _require_known(environment: Iterable[str]) -> None:
    """Raises InvalidArgument for a misspelt setting; what may be somebody else's is logged."""
    unknown = unknown_names(environment)
    for name in [name for name, meant in unknown.items() if not meant]:
        log.warning("%s is no setting of this server, and was ignored", name)
    if wrong := [f"{name}: is no setting; {m} is" for name, m in unknown.items() if m]:
        raise InvalidArgument("\n".join(wrong))


def _end(status: int, message: str) -> NoReturn:
    for line in message.splitlines():
        print(f"{PROGRAM}: {line}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()

"""Serves the sidecar from one of an engine's API servers: the one that holds the socket's lock.

vLLM runs one API server, or several (`--api-server-count`) on one engine. Each of them gets here.
The others wait, since vLLM goes on when one of them ends in peace (vllm/v1/utils.py,
wait_for_completion_or_failure): then the next one serves.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from apollo_grpc.addresses import target
from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.interceptors import SyncErrors
from apollo_grpc.locations import sidecar_address, socket_address, socket_path
from apollo_grpc.sidecar.v1.weight_export_pb2_grpc import add_WeightExportServiceServicer_to_server
from apollo_grpc.transport import SERVER_OPTIONS, PortLock, lock_socket
from apollo_sidecar.answers import Answers
from apollo_sidecar.engine import NO_PAUSE, Engine
from apollo_sidecar.sample_tokens import SampleTokens
from apollo_sidecar.service import WeightExportService
from apollo_sidecar.vllm_prompts import VllmPrompts

# A watcher holds a thread for as long as it watches.
SERVER_THREADS = 16
OWNER_READS = 10
OWNER_READ_SECONDS = 0.1
SUCCESSION_SECONDS = 1.0
STOP_SECONDS = 2.0
# Long enough for a training server to notice that its sidecar is gone, and to end its step.
INHERITED_PAUSE_SECONDS = 5.0
log = logging.getLogger("vllm.apollo")


async def start(client: Any, state: Any) -> asyncio.Task[None]:
    """Serves the sidecar of this engine, or waits for its API server that does to end.

    Args:
        client: vLLM's AsyncLLM, on the running loop.
        state: of the API server's FastAPI app, on the same loop.

    Returns the task that does so until it is cancelled. Raises ApolloError where the address
    cannot be served, or is another engine's.
    """
    address = sidecar_address()
    path = socket_path(address)
    if path is None:
        raise InvalidArgument.at(
            "APOLLO_SIDECAR",
            f"{address} is TCP, and the sidecar is served on a unix socket only. Set it to "
            "unix:PATH, or leave it unset.",
        )
    owner = await _engine_id(client)
    lock = await _lock(path, owner)
    if lock is None:
        log.info("apollo: another API server of this engine serves the sidecar on %s", address)
        return asyncio.create_task(_succeed(client, state, path, owner))
    server = _open(Engine(client, asyncio.get_running_loop()), state, path)
    return asyncio.create_task(_stop_at_end(server, lock))


async def _engine_id(client: Any) -> str:
    """The same for all API servers of one engine, and for no other engine."""
    return "-".join(await client.collective_rpc("apollo_engine_id"))


async def _lock(path: Path, owner: str) -> PortLock | None:
    """The socket's lock; None where an API server of the same engine has it.

    Raises FailedPrecondition where another engine, or another user, has the place.
    """
    for _ in range(OWNER_READS):
        try:
            return lock_socket(path, owner)
        except FailedPrecondition as error:
            if error.reason != "SOCKET_TAKEN":
                raise
            if error.metadata["owner"] == owner:
                return None
        # Who locked the file a moment ago has not written into it yet.
        await asyncio.sleep(OWNER_READ_SECONDS)
    raise FailedPrecondition(
        f"The sidecar of another engine listens on {path}. Start this vLLM and its training server "
        "with an address of their own, APOLLO_SIDECAR=unix:PATH.",
        reason="SIDECAR_TAKEN",
    )


async def _succeed(client: Any, state: Any, path: Path, owner: str) -> None:
    """Serves once the API server that does has ended."""
    try:
        while (lock := await _lock(path, owner)) is None:
            await asyncio.sleep(SUCCESSION_SECONDS)
        log.warning("apollo: the API server with the sidecar has ended; this one serves it now")
        server = _open(await _inherit(client), state, path)
    except FailedPrecondition as error:
        log.error("apollo: the sidecar is served no more; vLLM goes on. %s", error.message)
    except Exception:
        log.exception("apollo: the sidecar is served no more; vLLM goes on without it")
    else:
        await _stop_at_end(server, lock)


async def _inherit(client: Any) -> Engine:
    """The engine as an ended API server left it: of changed weights, perhaps paused."""
    stamped = await client.get_weight_version() if hasattr(client, "get_weight_version") else ""
    version = int(stamped) if stamped.isdecimal() else 0
    engine = Engine(client, asyncio.get_running_loop(), weight_version=version, as_loaded=False)
    if await client.is_paused():
        # No lease would ever end that pause, and vLLM would answer nobody.
        lease = ("apollo-inherited-pause", INHERITED_PAUSE_SECONDS, "keep")
        await asyncio.to_thread(engine.leases.acquire, *lease)
    else:
        await asyncio.to_thread(_end_untold_writes, engine)
    return engine


def _end_untold_writes(engine: Engine) -> None:
    """Of a training server that wrote while vLLM decoded: its lease ended with its sidecar."""
    lease_id = "apollo-inherited-writes"
    engine.leases.acquire(lease_id, INHERITED_PAUSE_SECONDS, NO_PAUSE)
    try:
        engine.leases.release(lease_id, 1)
    except Exception:
        log.exception("apollo: what was cached was not dropped; that is tried again")


def _open(engine: Engine, state: Any, path: Path) -> Any:
    """On the loop of the engine and of vLLM's app."""
    prompts = VllmPrompts(state)
    tokens = SampleTokens(prompts, asyncio.get_running_loop())
    service = WeightExportService(engine, tokens, Answers(engine, prompts))
    server = grpc.server(
        futures.ThreadPoolExecutor(SERVER_THREADS, thread_name_prefix="apollo-sidecar"),
        interceptors=[SyncErrors()],
        options=SERVER_OPTIONS,
    )
    add_WeightExportServiceServicer_to_server(service, server)
    server.add_insecure_port(target(socket_address(path)))
    server.start()
    log.info("apollo: the sidecar listens on %s", socket_address(path))
    return server


async def _stop_at_end(server: Any, lock: PortLock) -> None:
    """Waits until vLLM cancels its tasks at the end, then stops the server."""
    try:
        await asyncio.Event().wait()
    finally:
        # Otherwise gRPC would remove the socket that the next one has made by then.
        server.stop(grace=None).wait(STOP_SECONDS)
        lock.release()

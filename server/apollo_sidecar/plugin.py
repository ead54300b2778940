"""vLLM's two entry points, both named `apollo`.

vLLM loads general plugins in every process, also when nobody asked; `register` therefore acts
only where VLLM_PLUGINS names this plugin. Endpoint plugins are loaded by name only.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent import futures
from typing import Any

NAME = "apollo"
# A watcher holds a thread for as long as it watches.
SERVER_THREADS = 16
log = logging.getLogger("vllm.apollo")


def register() -> None:
    """vllm.general_plugins: prepares the worker classes of this process. Idempotent."""
    if NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    import vllm.v1.worker.worker_base as worker_base

    from apollo_sidecar import worker

    worker.install(worker_base)


class SidecarPlugin:
    """vllm.endpoint_plugins: serves WeightExportService from the API server's process."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Adds no HTTP route: the sidecar speaks gRPC on its own socket."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Starts the sidecar beside the API server; a failure is logged and vLLM goes on."""
        if engine_client is None:
            return
        try:
            server, lock = _start(engine_client, asyncio.get_running_loop())
        except Exception:
            log.exception("apollo: the sidecar did not start; vLLM goes on without it")
            return
        # Kept on the state: a task that nobody holds may be collected and the server with it.
        state.apollo_sidecar = asyncio.create_task(_stop_with_engine(server, lock))


def _start(engine_client: Any, loop: asyncio.AbstractEventLoop) -> tuple[Any, Any]:
    import grpc

    from apollo_grpc.interceptors import SyncErrors
    from apollo_grpc.locations import sidecar_address, socket_path
    from apollo_grpc.transport import SERVER_OPTIONS, open_port
    from apollo_grpc.v1.weight_export_pb2_grpc import add_WeightExportServiceServicer_to_server
    from apollo_sidecar.engine import Engine
    from apollo_sidecar.service import WeightExportService

    address = sidecar_address()
    if socket_path(address) is None:
        raise ValueError("the sidecar is served on a unix socket only; mend APOLLO_SIDECAR")
    server = grpc.server(
        futures.ThreadPoolExecutor(SERVER_THREADS, thread_name_prefix="apollo-sidecar"),
        interceptors=[SyncErrors()],
        options=SERVER_OPTIONS,
    )
    add_WeightExportServiceServicer_to_server(
        WeightExportService(Engine(engine_client, loop)), server
    )
    lock = open_port(server, address)
    server.start()
    log.info("apollo: the sidecar listens on %s", address)
    return server, lock


async def _stop_with_engine(server: Any, lock: Any) -> None:
    """Waits until vLLM cancels its tasks at the end, then stops the server."""
    try:
        await asyncio.Event().wait()
    finally:
        server.stop(grace=None)
        lock.release()

"""vLLM's two entry points, both named `apollo`.

vLLM loads general plugins in every process, also when nobody asked; `register` therefore acts
only where VLLM_PLUGINS names this plugin. Endpoint plugins are loaded by name only.
"""

from __future__ import annotations

import logging
import os
from typing import Any

NAME = "apollo"
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
            from apollo_sidecar import serving

            # Kept on the state: a task that nobody holds may be collected and the server with it.
            state.apollo_sidecar = await serving.start(engine_client, state)
        except Exception as error:
            # What is meant for the user is said without a traceback.
            told = getattr(error, "message", "")
            log.error(
                "apollo: the sidecar did not start; vLLM goes on without it. %s",
                told,
                exc_info=None if told else error,
            )

"""What a server tells those who measure it: spans of calls, and metrics where asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc.aio

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.interceptors import Check
from apollo_grpc.transport import ServerTls
from apollo_trainer.config import Settings
from apollo_trainer.engine import ModelOwner, StatusBoard
from apollo_trainer.guards import Guard
from apollo_trainer.operations import CheckpointJobs
from apollo_trainer.runs import RunQueue
from apollo_trainer.watching import Ring
from apollo_trainer.watching.measured_calls import RpcSeconds, TraceParents

if TYPE_CHECKING:
    from apollo_trainer.watching.metrics import Metrics
    from apollo_trainer.watching.metrics_port import MetricsPort


class Measured:
    """Metrics of one server, if it has an address for them.

    Args:
        guard: of callers over TCP; asked where there is TLS.

    Attributes:
        interceptors: stand before those that refuse calls.

    Raises FailedPrecondition without prometheus-client, and as `MetricsPort`.
    """

    def __init__(self, settings: Settings, guard: Callable[[], Guard]):
        self.interceptors: list[grpc.aio.ServerInterceptor] = [TraceParents()]
        self._metrics: Metrics | None = None
        self._port: MetricsPort | None = None
        if settings.metrics_address is None:
            return
        of_tcp = guard() if settings.tls_certificate else Guard(None)
        address = settings.metrics_address
        self._metrics, self._port = _opened(address, of_tcp.check, of_tcp.tls)
        self.interceptors.insert(0, RpcSeconds(self._metrics.called))

    def show(
        self,
        board: StatusBoard,
        ring: Ring,
        owner: ModelOwner,
        queue: RunQueue,
        jobs: CheckpointJobs,
    ) -> None:
        """Has the parts of the server tell their figures from now on."""
        if metrics := self._metrics:
            metrics.show(board, ring, lambda: _snapshot_bytes(owner))
            queue.writer.took = metrics.committed
            jobs.synced = metrics.synced

    def stop(self) -> None:
        """Closes the port."""
        if self._port:
            self._port.stop()


def _opened(
    address: str, check: Check | None, tls: ServerTls | None
) -> tuple[Metrics, MetricsPort]:
    try:
        from apollo_trainer.watching.metrics import Metrics
        from apollo_trainer.watching.metrics_port import MetricsPort
    except ImportError as error:
        raise FailedPrecondition(
            f"metrics_address is set, and {error.name} is not installed; nothing was opened. Run "
            "pip install 'apollo-grpc[metrics]', or leave it unset.",
            reason="FAILED_PRECONDITION",
        ) from error
    metrics = Metrics()
    return metrics, MetricsPort(metrics.registry, address, tls, check)


def _snapshot_bytes(owner: ModelOwner) -> float:
    session = owner.live_session
    try:
        return sum(info.size_bytes for info in session.checkpoints.store.list()) if session else 0
    except OSError:
        # A disk that cannot be read takes this figure away, and no other.
        return math.nan

"""What Prometheus is told: counters from events, and the status as it is when it is asked for.

Needs prometheus-client, the extra `metrics`. No figure is of one run: a label has few values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from apollo_grpc.v1 import reason_pb2, status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import StatusBoard
from apollo_trainer.ledger import ENDED
from apollo_trainer.watching.ring import Ring

PHASES = ("forward", "backward", "optimizer", "wait", "pause")
COMMIT_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SYNC_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
# Of streams too, which last as long as their callers stay.
CALL_BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0, 1000.0)
# What a label may say beside the contract's reasons.
OTHER = "OTHER"
_REASONS = {name.removeprefix("REASON_") for name in reason_pb2.Reason.DESCRIPTOR.values_by_name}


class Metrics:
    """The figures of one server since it started. Any thread may call every method.

    Attributes:
        registry: what is exposed.
    """

    def __init__(self) -> None:
        # Prometheus has no use for the time at which each counter began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self.registry = CollectorRegistry()
        self._counted = _Counted(registry)
        self._synced = ("", 0)
        self._commits = Histogram(
            "apollo_ledger_commit_seconds", "Of one commit of the ledger.",
            registry=registry, buckets=COMMIT_BUCKETS,
        )  # fmt: skip
        self._syncs = Histogram(
            "apollo_sync_seconds", "Of one sync that succeeded.",
            registry=registry, buckets=SYNC_BUCKETS,
        )  # fmt: skip
        self._calls = Histogram(
            "apollo_rpc_seconds", "Of one call, by its method and status code.",
            ("method", "code"), registry=registry, buckets=CALL_BUCKETS,
        )  # fmt: skip

    def show(self, board: StatusBoard, ring: Ring, snapshot_bytes: Callable[[], float]) -> None:
        """Counts the board's events from now on, and shows its status to who asks.

        Args:
            snapshot_bytes: of those on disk; may read it.
        """
        board.observe(self.event)
        self.registry.register(_Now(board, ring, snapshot_bytes, lambda: self._synced))

    def event(self, event: pb.RunEvent) -> None:
        """Counts an event of a run; some 20 us of a step, less of any other."""
        if event.HasField("step"):
            self._counted.step(event.step)
        elif event.HasField("finished"):
            self._counted.finished(event.finished)

    def synced(self, seconds: float, written: int, epoch: str, version: int) -> None:
        """Counts a sync of an engine's weights of this version."""
        self._syncs.observe(seconds)
        self._counted.sync_bytes.inc(written)
        self._synced = (epoch, version)

    def committed(self, seconds: float) -> None:
        """Counts a commit of the ledger."""
        self._commits.observe(seconds)

    def called(self, method: str, code: str, seconds: float) -> None:
        """Counts a call that has ended."""
        self._calls.labels(method, code).observe(seconds)


class _Counted:
    """What rises with events."""

    def __init__(self, registry: CollectorRegistry):
        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"apollo_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"apollo_{name}", text, registry=registry)

        self._steps = counter("steps", "Steps that were written.")
        self._tokens = counter("tokens", "Continuation tokens of these.")
        self._loss = gauge("last_loss_nats", "Of the last step, a token.")
        self._norm = gauge("last_gradient_norm", "Of the last step, not clipped.")
        seconds = counter("step_seconds", "Of steps, by what they did.", ["phase"])
        self._seconds = {phase: seconds.labels(phase) for phase in PHASES}
        self._paused = counter("paused_seconds", "That vLLM was paused for runs.")
        # Each from 0 on: what first appears as 1 has not risen, to Prometheus.
        runs = counter("runs", "That have ended, by their states.", ["state"])
        self._runs = {state: runs.labels(_word(state)) for state in ENDED}
        self._failures = counter("run_failures", "Runs that failed, by the reason.", ["reason"])
        self.sync_bytes = counter("sync_bytes", "That syncs wrote.")

    def step(self, step: pb.RunEvent.Step) -> None:
        """A dry run's is none."""
        if step.dry_run:
            return
        self._steps.inc()
        self._tokens.inc(step.tokens)
        self._loss.set(step.loss)
        self._norm.set(step.grad_norm)
        for phase, counted in self._seconds.items():
            spent = getattr(step, f"{phase}_time")
            counted.inc(spent.seconds + spent.nanos / 1e9)

    def finished(self, finished: pb.RunEvent.Finished) -> None:
        """Of a run that waited too."""
        spent = finished.pause_time
        self._paused.inc(spent.seconds + spent.nanos / 1e9)
        if finished.state in self._runs:
            self._runs[finished.state].inc()
        if reason := finished.failure.reason:
            self._failures.labels(reason if reason in _REASONS else OTHER).inc()


class _Now(Collector):
    """How the server is when Prometheus asks."""

    def __init__(
        self,
        board: StatusBoard,
        ring: Ring,
        snapshot_bytes: Callable[[], float],
        synced: Callable[[], tuple[str, int]],
    ):
        self._board, self._ring = board, ring
        self._snapshot_bytes, self._synced = snapshot_bytes, synced

    def collect(self) -> Iterator[Metric]:
        """All gauges, from one status."""
        status = self._board.snapshot()
        attached = status.attachment == status_pb2.ATTACHMENT_STATE_ATTACHED
        for name, text, value in (
            ("attached", "Whether an engine's weights are mapped and verified.", attached),
            ("queued_runs", "That wait.", status.queue_length),
            ("active_runs", "At work: one or none.", bool(status.active_run_id)),
            ("weight_version", "Of the live weights.", status.weight_version),
            ("unsynced_updates", "Updates since the last sync, or since vLLM loaded the weights "
             "where this server has not synced them.", self._unsynced(status)),
            ("optimizer_step", "Steps since the optimizer's state began.", status.optimizer_step),
            ("optimizer_state_bytes", "Of the optimizer's state.", status.state_size_bytes),
            ("snapshot_bytes", "Of the attached model's snapshots on disk.",
             self._snapshot_bytes()),
            ("watchers", "Streams of WatchStatus.", self._ring.watchers),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"apollo_{name}", text, value)
        lost = "Updates that slow watchers did not get."
        yield CounterMetricFamily("apollo_dropped_updates", lost, self._ring.lost)

    def _unsynced(self, status: status_pb2.ServerStatus) -> int:
        # Each engine counts from 0, from what the model directory has.
        epoch, version = self._synced()
        return status.weight_version - (version if epoch == status.engine_epoch else 0)


def _word(state: pb.RunState.ValueType) -> str:
    return pb.RunState.Name(state).removeprefix("RUN_STATE_").lower()

"""What the command prints: events, statuses and progress, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from apollo_grpc.v1 import checkpoint_pb2, status_pb2, training_pb2

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]
ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
MIB = 2**20


def to_json(message: Message) -> str:
    """One line of JSON, with the names of the contract."""
    fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(fields)


def state_name(value: Any, enum: Any, prefix: str) -> str:
    """An enum's value as a word: `ATTACHED`."""
    return str(enum.Name(value)).removeprefix(prefix)


def event_line(event: training_pb2.RunEvent) -> str:
    """An event in words, without its run."""
    kind = event.WhichOneof("event")
    lines = {
        "queued": lambda e: f"queued, {e.position} ahead",
        "started": lambda e: (
            f"started: {e.steps_total} steps from optimizer step {e.optimizer_step}, "
            f"weight version {e.weight_version}"
        ),
        "step": lambda e: (
            f"step {e.step}  loss {e.loss:.4f}  grad norm {e.grad_norm:.3g}  "
            f"lr {e.learning_rate:.3g}  {_milliseconds(e):.0f} ms"
            f"{'  (dry run)' if e.dry_run else ''}"
        ),
        "evaluated": lambda e: (
            f"loss of each sample {'after' if e.after_training else 'before'}: "
            + " ".join(f"{x:.4f}" for x in e.losses)
        ),
        "checkpoint": lambda e: (
            f"Apollo state on disk: step {e.optimizer_step}, {e.size_bytes / MIB:.1f} MiB"
        ),
        "warning": lambda e: f"warning {e.reason}: {e.message}",
        "finished": _finished_line,
    }
    return lines[kind](getattr(event, kind)) if kind else "an event of a later version"


def _milliseconds(step: training_pb2.Step) -> float:
    parts = (step.forward_time, step.backward_time, step.optimizer_time)
    return sum(part.ToNanoseconds() for part in parts) / 1e6


def _finished_line(finished: training_pb2.Finished) -> str:
    word = state_name(finished.state, training_pb2.RunState, "RUN_STATE_").lower()
    if finished.HasField("failure"):
        return f"{word}: {finished.failure.message} ({finished.failure.reason})"
    stopped = f". {finished.stopped.message}" if finished.HasField("stopped") else ""
    return (
        f"{word}: {finished.steps_done} steps, weight version {finished.weight_version}, "
        f"vLLM paused for {finished.pause_time.ToNanoseconds() / 1e9:.2f} s{stopped}"
    )


def run_line(run: training_pb2.Run) -> str:
    """A run in one line, its whole id first."""
    state = state_name(run.state, training_pb2.RunState, "RUN_STATE_").lower()
    when = run.create_time.ToDatetime().isoformat(" ", "seconds")
    reason = f"  {run.failure.reason}" if run.HasField("failure") else ""
    return f"{run.run_id}  {when}  {state:<9}  {run.steps_done}/{run.steps_total} steps{reason}"


def run_lines(run: training_pb2.Run) -> Iterable[str]:
    """A run, a line a subject."""
    yield run_line(run)
    for name, time in (
        ("created", run.create_time),
        ("started", run.start_time),
        ("ended", run.end_time),
    ):
        if time.seconds:
            yield f"{name:<10} {time.ToDatetime().isoformat(' ', 'seconds')} UTC"
    yield f"{'events':<10} {run.last_sequence}; 'apollo watch {run.run_id}' shows them"
    if run.spec.samples:
        yield f"{'samples':<10} {len(run.spec.samples)}"
    if run.HasField("failure"):
        yield f"{'failure':<10} {run.failure.message} ({run.failure.reason})"


class RunDisplay:
    """A bar with the loss on a terminal, a line an event elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss [bold]{task.fields[loss]}[/]"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("waiting", total=None, loss="-")

    def follow(self, events: Iterable[training_pb2.RunEvent]) -> training_pb2.Finished:
        """Shows every event until the last, which it returns."""
        finished = training_pb2.Finished()
        with self._bar if self._console.is_terminal else self._console:
            for event in events:
                self._show(event)
                if event.HasField("finished"):
                    finished = event.finished
        return finished

    def _show(self, event: training_pb2.RunEvent) -> None:
        if not self._console.is_terminal:
            # A pipe's buffer would hold lines back until the run has ended.
            print(event_line(event), flush=True)
        elif event.HasField("started"):
            self._bar.update(self._task, description="training", total=event.started.steps_total)
        elif event.HasField("step"):
            loss = f"{event.step.loss:.4f}"
            self._bar.update(self._task, completed=event.step.step, loss=loss)
        else:
            self._console.print(event_line(event), markup=False, highlight=False)


def status_lines(status: status_pb2.ServerStatus) -> list[str]:
    """The status, a line a subject, never cut to a terminal's width."""
    return [f"{name:<10} {value}" for name, value in _status_rows(status)]


def _status_rows(status: status_pb2.ServerStatus) -> Iterable[tuple[str, str]]:
    state = state_name(status.attachment, status_pb2.AttachmentState, "ATTACHMENT_STATE_")
    yield "engine", f"{state.lower()}: {status.attachment_detail}"
    if status.model:
        yield "model", status.model
    if status.attachment == ATTACHED:
        memory = status.weight_memory
        yield (
            "weights",
            (
                f"version {status.weight_version}; {memory.parameters:,} parameters, "
                f"{memory.shared_bytes:,} bytes shared with vLLM, {memory.copied_bytes:,} copied"
            ),
        )
        yield "agreement", f"log-probabilities within {status.logprob_difference:.1e} nats"
        yield (
            "optimizer",
            (f"step {status.optimizer_step}, {status.state_size_bytes / MIB:.1f} MiB of state"),
        )
    yield "runs", f"{status.active_run_id or 'none'} active, {status.queue_length} waiting"
    if status.HasField("last_sync"):
        when = status.last_sync.time.ToDatetime().isoformat(" ", "seconds")
        yield "last sync", f"{when} UTC, weight version {status.last_sync.weight_version}"
    yield "server", f"{status.server_version}, up {status.uptime.seconds} s"


def update_line(update: status_pb2.WatchStatusResponse) -> str:
    """An update of a subscription in words."""
    lost = f"({update.dropped} updates lost) " if update.dropped else ""
    if update.HasField("event"):
        return f"{lost}run {update.event.run_id[:8]}  {event_line(update.event)}"
    if update.HasField("status"):
        state = state_name(
            update.status.attachment, status_pb2.AttachmentState, "ATTACHMENT_STATE_"
        )
        return (
            f"{lost}status  {state.lower()}, weight version {update.status.weight_version}, "
            f"optimizer step {update.status.optimizer_step}, {update.status.queue_length} waiting"
        )
    return f"{lost}heartbeat"


def sync_line(result: checkpoint_pb2.SyncResult) -> str:
    """The result of a sync in words."""
    if not result.files_written:
        return f"nothing had changed: {result.bytes_compared:,} bytes compared"
    method = state_name(result.method, checkpoint_pb2.SyncMethod, "SYNC_METHOD_")
    return (
        f"wrote {', '.join(result.files_written)}: {result.tensors_changed} tensors changed, "
        f"{result.bytes_written:,} bytes by {method}; the directory holds weight version "
        f"{result.weight_version}"
    )


def verify_lines(result: checkpoint_pb2.VerifyResult) -> Iterable[str]:
    """What a verification found, a line each."""
    for found in result.differences:
        yield f"{found.file}{': ' if found.tensor else ''}{found.tensor}: {found.description}"
    verdict = f"{len(result.differences)} differences" if result.differences else "as it was left"
    yield (
        f"{result.directory}: {verdict}; sync {result.generation}, {result.tensors} tensors, "
        f"{result.bytes_read:,} bytes read"
    )


def adopt_line(result: checkpoint_pb2.AdoptResult) -> str:
    """The copy that was made, and what to do with it."""
    return (
        f"copied {result.files} files, {result.bytes_written:,} bytes, to {result.directory}; "
        "they hold what vLLM loaded, not what was learned since: 'apollo checkpoint export' "
        "writes that"
    )


def snapshot_line(snapshot: checkpoint_pb2.Snapshot) -> str:
    """A snapshot in one line, its whole id first."""
    when = snapshot.create_time.ToDatetime().isoformat(" ", "seconds")
    name = snapshot.name or "(automatic)"
    return (
        f"{snapshot.snapshot_id}  {when} UTC  {name}  weight version {snapshot.weight_version}, "
        f"optimizer step {snapshot.optimizer_step}, {snapshot.size_bytes:,} bytes"
    )


def restore_line(result: checkpoint_pb2.RestoreResult) -> str:
    """What is live after a restore or an undo, and what went wrong by then."""
    live = (
        f"the live weights are version {result.weight_version}, the optimizer is at step "
        f"{result.optimizer_step}; 'apollo sync' puts them into the model directory"
    )
    warned = [f"warning: {warning.message} ({warning.reason})" for warning in result.warnings]
    return "\n".join([live, *warned])


def export_line(result: checkpoint_pb2.ExportResult) -> str:
    """What was exported, and where to."""
    return (
        f"wrote {result.bytes_written:,} bytes of weights, version {result.weight_version}, to "
        f"{result.directory}"
    )

"""What the command prints: runs, statuses and results, for people and for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from google.protobuf import json_format
from google.protobuf.message import Message

from apollo_client.sample_values import shown
from apollo_grpc.v1 import checkpoint_pb2, dataset_pb2, status_pb2, training_pb2

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]
ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
MIB = 2**20
# A request id that nobody chose, and nobody looks for.
_MADE_BY_A_CLIENT = re.compile(r"[0-9a-f]{32}")


def to_json(message: Message) -> str:
    """One line of JSON, with the names of the contract."""
    fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(fields)


def state_name(value: Any, enum: Any, prefix: str) -> str:
    """An enum's value as a word: `ATTACHED`."""
    return str(enum.Name(value)).removeprefix(prefix)


def run_line(run: training_pb2.Run) -> str:
    """A run in one line, its whole id first."""
    state = state_name(run.state, training_pb2.RunState, "RUN_STATE_").lower()
    when = run.create_time.ToDatetime().isoformat(" ", "seconds")
    reason = f"  {run.failure.reason}" if run.HasField("failure") else ""
    steps, name = f"{run.steps_done}/{run.steps_total} steps", run.spec.name
    named = f"  {shown(name)}" if name else ""
    return f"{run.run_id}  {when}  {state:<9}  {steps}{reason}{named}"


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
    if run.spec.labels:
        labels = (f"{shown(key)}={shown(value)}" for key, value in run.spec.labels.items())
        yield f"{'labels':<10} {', '.join(sorted(labels))}"
    if run.HasField("last_loss"):
        yield f"{'last loss':<10} {run.last_loss:.4f}"
    if run.HasField("weight_version"):
        yield f"{'weights':<10} version {run.weight_version}"
    if run.HasField("failure"):
        yield f"{'failure':<10} {run.failure.message} ({run.failure.reason})"


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


def info_lines(info: status_pb2.GetServerInfoResponse) -> list[str]:
    """What a server and its model can do, a line a subject."""
    return [f"{name:<10} {value}" for name, value in _info_rows(info)]


def _info_rows(info: status_pb2.GetServerInfoResponse) -> Iterable[tuple[str, str]]:
    limits, queued = info.limits, f"{info.limits.queued_bytes // MIB:,} MiB together"
    versions = [f"{name} {number}" for name, number in sorted(info.versions.items())]
    yield "server", info.server_version
    yield "libraries", ", ".join(versions)
    yield "runs", f"of at most {limits.samples:,} samples and {limits.message_bytes // MIB:,} MiB"
    yield "queue", f"at most {limits.queued_runs:,} runs, of {queued}"
    yield (
        "datasets",
        f"at most {limits.datasets:,}, of {limits.dataset_samples:,} samples each and "
        f"{limits.dataset_bytes // MIB:,} MiB together",
    )
    yield "open", f"at most {limits.streams:,} streams and {limits.watchers:,} watchers"
    if info.HasField("model"):
        yield from _model_rows(info.model)
    else:
        yield "model", "none is attached; 'apollo status' says why"


def _model_rows(model: status_pb2.ModelInfo) -> Iterable[tuple[str, str]]:
    names, prefix = training_pb2.CoherenceMode, "COHERENCE_MODE_"
    modes = [state_name(mode, names, prefix).lower() for mode in model.coherence_modes]
    yield "model", model.directory
    yield "weights", f"{model.architecture}, {model.parameters:,} in {model.dtype}"
    yield "tokens", f"{model.vocabulary:,} different; at most {model.max_length:,} in a sequence"
    yield "tokenizer", f"SHA-256 {model.tokenizer_digest}" if model.tokenizer_digest else "none"
    yield "vLLM", model.vllm_version or "of an unknown version"
    yield "modes", ", ".join(modes)
    yield "undo", f"{model.undoable_updates:,} updates can be taken back"


def operation_line(operation: checkpoint_pb2.Operation) -> str:
    """An operation in one line, its whole id first."""
    kind = state_name(operation.kind, checkpoint_pb2.OperationKind, "OPERATION_KIND_")
    state = state_name(operation.state, checkpoint_pb2.OperationState, "OPERATION_STATE_").lower()
    when = operation.create_time.ToDatetime().isoformat(" ", "seconds")
    line = f"{operation.operation_id}  {when}  {state:<9}  {kind.lower().replace('_', ' ')}"
    if operation.HasField("progress") and not operation.HasField("end_time"):
        progress = operation.progress
        line += f"  {progress.bytes_done:,} of {progress.bytes_total:,} bytes"
    if operation.request_id and not _MADE_BY_A_CLIENT.fullmatch(operation.request_id):
        line += f"  request id {shown(operation.request_id)}"
    return f"{line}  {operation.failure.reason}" if operation.HasField("failure") else line


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


def dataset_line(dataset: dataset_pb2.Dataset) -> str:
    """A dataset in one line, its whole id first."""
    when = dataset.create_time.ToDatetime().isoformat(" ", "seconds")
    name = dataset.name if dataset.name.isprintable() else repr(dataset.name)
    return (
        f"{dataset.dataset_id}  {when} UTC  {name or '(no name)'}  {dataset.samples:,} samples, "
        f"{dataset.size_bytes:,} bytes"
    )


def probe_line(probe: training_pb2.Probe) -> str:
    """A probe of the regression set in one line, its whole name first."""
    check = state_name(probe.check, training_pb2.ProbeCheck, "PROBE_CHECK_").lower()
    sample = probe.sample
    if sample.HasField("text"):
        asked, expected = sample.text.context, sample.text.continuation
    elif sample.HasField("chat"):
        *before, answer = sample.chat.messages or [training_pb2.ChatMessage()]
        asked, expected = (before[-1].content if before else ""), answer.content
    else:
        ids = sample.tokens
        asked, expected = f"{list(ids.context_ids)}", f"{list(ids.continuation_ids)}"
    check = check if probe.check else "contains"
    name = probe.name if probe.name.isprintable() else repr(probe.name)
    return f"{name}  {check}  {shown(asked)}  ->  {shown(expected)}"

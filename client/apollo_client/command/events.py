"""Events of runs in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from apollo_client.command.display import MIB, state_name
from apollo_client.sample_values import shown
from apollo_grpc.v1 import status_pb2, training_pb2


def event_line(event: training_pb2.RunEvent) -> str:
    """An event in words, without its run."""
    kind = event.WhichOneof("event")
    lines: dict[str, Callable[[Any], str]] = {
        "queued": lambda e: f"queued, {e.position} ahead",
        "started": lambda e: (
            f"started: {e.steps_total} steps from optimizer step {e.optimizer_step}, "
            f"weight version {e.weight_version}"
        ),
        "step": _step_line,
        "evaluated": _evaluated_line,
        "probed": _probed_line,
        "state_saved": lambda e: (
            f"Apollo state on disk: step {e.optimizer_step}, {e.size_bytes / MIB:.1f} MiB"
        ),
        "warning": lambda e: f"warning {e.reason}: {e.message}",
        "finished": _finished_line,
    }
    return lines[kind](getattr(event, kind)) if kind else "an event of a later version"


def figures(step: training_pb2.RunEvent.Step) -> str:
    """A step's loss, that of its anchors beside it, and what a policy gradient tells."""
    told = f"{step.loss:.4f}"
    if step.HasField("anchor_loss"):
        told += f"  anchors {step.anchor_loss:.4f}"
    if step.HasField("policy"):
        policy = step.policy
        told += f"  ratio {policy.mean_ratio:.3f}  kl {policy.kl:.4f}"
        told += f"  clipped {policy.clipped_fraction:.1%}"
    return told


def _step_line(step: training_pb2.RunEvent.Step) -> str:
    return (
        f"step {step.step}  loss {figures(step)}  grad norm {step.grad_norm:.3g}  "
        f"lr {step.learning_rate:.3g}  {_milliseconds(step):.0f} ms"
        f"{'  (dry run)' if step.dry_run else ''}"
    )


def _milliseconds(step: training_pb2.RunEvent.Step) -> float:
    parts = (step.forward_time, step.backward_time, step.optimizer_time)
    return sum(part.ToNanoseconds() for part in parts) / 1e6


def _evaluated_line(evaluated: training_pb2.RunEvent.Evaluated) -> str:
    when = "after" if evaluated.after_training else "before"
    if evaluated.step and not evaluated.after_training:
        when = f"after step {evaluated.step}"
    told = {
        "sample": evaluated.losses,
        "evaluation sample": evaluated.evaluation_losses,
        "anchor": evaluated.anchor_losses,
    }
    lines = [f"loss of each {name} {when}: {_each(found)}" for name, found in told.items() if found]
    return "; ".join(lines) or f"evaluated {when}"


def _each(losses: Sequence[float]) -> str:
    mean = f" (mean {sum(losses) / len(losses):.4f})" if len(losses) > 1 else ""
    return " ".join(f"{loss:.4f}" for loss in losses) + mean


def _probed_line(probed: training_pb2.RunEvent.Probed) -> str:
    passed = sum(result.passed for result in probed.results)
    when = "after" if probed.after_training else "before"
    return f"probes passed {when}: {passed} of {len(probed.results)}"


def _finished_line(finished: training_pb2.RunEvent.Finished) -> str:
    word = state_name(finished.state, training_pb2.RunState, "RUN_STATE_").lower()
    if finished.HasField("failure"):
        return f"{word}: {finished.failure.message} ({finished.failure.reason})"
    stopped = f". {finished.stopped.message}" if finished.HasField("stopped") else ""
    return (
        f"{word}: {finished.steps_done} steps, weight version {finished.weight_version}, "
        f"vLLM paused for {finished.pause_time.ToNanoseconds() / 1e9:.2f} s{stopped}"
    )


def probe_table(
    before: training_pb2.RunEvent.Probed, after: training_pb2.RunEvent.Probed
) -> Iterable[str]:
    """What each probe's answer was before and after the run, a line a probe."""
    passed = {(result.name, result.regression): result.passed for result in before.results}
    rows = [["probe", "role", "before", "after", "expected", "answer"]]
    for result in after.results:
        role = state_name(result.role, training_pb2.ProbeRole, "PROBE_ROLE_").lower()
        role += ", regression" if result.regression else ""
        was = _verdict(passed.get((result.name, result.regression)))
        answers = [shown(result.expected), _answer(result)]
        rows.append([shown(result.name), role, was, _verdict(result.passed), *answers])
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _verdict(passed: bool | None) -> str:
    return {True: "passed", False: "failed", None: "-"}[passed]


def _answer(result: training_pb2.ProbeResult) -> str:
    if result.HasField("log_probability"):
        return f"log-probability {result.log_probability:.3f}"
    return shown(result.answer)


def update_line(update: status_pb2.WatchStatusResponse | training_pb2.WatchRunsResponse) -> str:
    """An update of a subscription in words."""
    if isinstance(update, training_pb2.WatchRunsResponse):
        return _revised_line(update)
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


def _revised_line(update: training_pb2.WatchRunsResponse) -> str:
    if not update.HasField("event"):
        return f"{update.revision}  now"
    return f"{update.revision}  run {update.event.run_id[:8]}  {event_line(update.event)}"

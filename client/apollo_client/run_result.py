"""What a run came to, gathered from its events once for both clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, Self

from apollo_grpc.errors import (
    ERROR_OF_CODE,
    Aborted,
    ApolloError,
    Cancelled,
    FailedPrecondition,
)
from apollo_grpc.v1 import training_pb2 as pb


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        state: "succeeded", "failed", "cancelled" or "rejected".
        steps: that are in the weights; none of a dry run's are.
        weight_version: of the weights after the run.
        failure: reason and message, where it failed or was rejected.
        stopped: likewise, where it succeeded before its last step.
        told: the events of its steps, without what they say of each sample. Of a stream that began
            after a sequence, those after it.
    """

    run_id: str
    state: str
    steps: int
    weight_version: int
    failure: pb.Notice | None = None
    stopped: pb.Notice | None = None
    told: Sequence[pb.RunEvent.Step] = field(default=(), repr=False)

    @property
    def losses(self) -> list[float]:
        """Of each step, in nats a token, before its update."""
        return [step.loss for step in self.told]

    def raise_for_failure(self) -> Self:
        """Itself, of a run that succeeded.

        Raises the `ApolloError` that a call would raise for the failure's reason: Cancelled for a
        run that was cancelled, Aborted for what befalls runs alone, as being rejected.
        """
        if self.state != "succeeded":
            raise self._error()
        return self

    def _error(self) -> ApolloError:
        about = {"run_id": self.run_id}
        if self.failure is None:
            says = f"Run {self.run_id} was cancelled; its {self.steps} steps are in the weights."
            return Cancelled(says, reason="RUN_CANCELLED", metadata=about)
        kind = _kind_of(self.failure.reason)
        return kind(self.failure.message, reason=self.failure.reason, metadata=about)

    def to_pandas(self) -> Any:
        """A DataFrame of pandas with a row a step: its number, loss, norms, rate and times.

        Raises ImportError where pandas is not installed.
        """
        # Costs every import of the client what few runs need.
        from apollo_client.sinks.figures import step_figures

        try:
            pandas = import_module("pandas")
        except ImportError as error:
            says = "to_pandas() needs pandas, which is not installed: run 'pip install pandas'"
            raise ImportError(says, name="pandas") from error
        rows = [{"step": step.step, **step_figures(step)} for step in self.told]
        return pandas.DataFrame(rows)

    def plot(self, path: str | PathLike[str]) -> Path:
        """Writes the losses as a line, in an SVG file; returns its path. Raises OSError."""
        if not self.told:
            raise FailedPrecondition(
                f"Run {self.run_id} took no step: there is no loss to draw.", reason="NO_STEPS"
            )
        # Costs every import of the client what few runs need.
        from apollo_client.loss_line import loss_line

        written = Path(path)
        steps = [step.step for step in self.told]
        written.write_text(loss_line(f"Run {self.run_id}", steps, self.losses), encoding="utf-8")
        return written


def _kind_of(reason: str) -> type[ApolloError]:
    """The error that a call ends with for a reason."""
    # Costs every import of the client what failures alone need.
    from apollo_grpc.v1 import reason_pb2

    known = reason_pb2.Reason.DESCRIPTOR.values_by_name.get(f"REASON_{reason}")
    codes = known.GetOptions().Extensions[reason_pb2.reason_info].codes if known else ()
    kinds = {code.name: kind for code, kind in ERROR_OF_CODE.items()}
    return kinds[codes[0]] if codes else Aborted


class RunRecord:
    """What the events of one run have told so far."""

    def __init__(self) -> None:
        # As bytes they take a tenth of the memory; of most streams nobody asks for them.
        self._steps: list[bytes] = []
        self._last: pb.RunEvent | None = None

    def take(self, event: pb.RunEvent) -> None:
        """Keeps what a result needs of the next event."""
        if event.HasField("step"):
            step = pb.RunEvent.Step()
            step.CopyFrom(event.step)
            step.ClearField("sample_indices")
            step.ClearField("sample_losses")
            self._steps.append(step.SerializeToString())
        elif event.HasField("finished"):
            self._last = event

    def result(self) -> RunResult:
        """Of the whole run. Raises FailedPrecondition where its end was not told."""
        if self._last is None:
            raise left("result")
        end = self._last.finished
        return RunResult(
            run_id=self._last.run_id,
            state=pb.RunState.Name(end.state).removeprefix("RUN_STATE_").lower(),
            steps=end.steps_done,
            weight_version=end.weight_version,
            failure=end.failure if end.HasField("failure") else None,
            stopped=end.stopped if end.HasField("stopped") else None,
            told=tuple(map(pb.RunEvent.Step.FromString, self._steps)),
        )


def left(what: str) -> FailedPrecondition:
    """The refusal of what a stream that was left, or whose client was closed, does not know."""
    return FailedPrecondition(
        f"The stream was left before it told the run's {what}; the run goes on. "
        "'watch_run(run_id)' reads it again.",
        reason="STREAM_LEFT",
    )

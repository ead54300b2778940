"""One run, shown until it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from apollo_client.command.display import to_json
from apollo_client.command.events import event_line, figures, probe_table
from apollo_client.command.outcome import INTERRUPTED, REFUSED
from apollo_grpc.v1 import training_pb2


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
        self._probed_before = training_pb2.RunEvent.Probed()

    def follow(self, events: Iterable[training_pb2.RunEvent]) -> training_pb2.RunEvent.Finished:
        """Shows every event until the last, which it returns."""
        finished = training_pb2.RunEvent.Finished()
        with self._bar if self._console.is_terminal else self._console:
            for event in events:
                self._show(event)
                if event.HasField("finished"):
                    finished = event.finished
        return finished

    def _show(self, event: training_pb2.RunEvent) -> None:
        if self._console.is_terminal and event.HasField("started"):
            self._bar.update(self._task, description="training", total=event.started.steps_total)
        elif self._console.is_terminal and event.HasField("step"):
            loss = figures(event.step)
            self._bar.update(self._task, completed=event.step.step, loss=loss)
        else:
            self._print(event_line(event))
        if event.HasField("probed"):
            self._show_probes(event.probed)

    def _show_probes(self, probed: training_pb2.RunEvent.Probed) -> None:
        if not probed.after_training:
            self._probed_before = probed
            return
        for line in probe_table(self._probed_before, probed):
            self._print(line)

    def _print(self, line: str) -> None:
        if self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False)
        else:
            # A pipe's buffer would hold lines back until the run has ended.
            print(line, flush=True)


def follow(stream: Iterable[training_pb2.RunEvent], as_json: bool, run_id: str = "") -> None:
    """Shows a run's events until its last; ends the command where the run did not succeed.

    Ctrl-C ends the command, too, and leaves the run at work. One that failed, was cancelled or was
    rejected by its probes ends it with the status 1.

    Args:
        run_id: the run's, where it is known before its first event.
    """
    finished = training_pb2.RunEvent.Finished()

    def events() -> Any:
        nonlocal run_id
        for event in stream:
            run_id = event.run_id
            yield event

    try:
        if as_json:
            for event in events():
                print(to_json(event), flush=True)
                finished = event.finished
        else:
            finished = RunDisplay(Console()).follow(events())
    except KeyboardInterrupt:
        leave(run_id)
    if finished.state != training_pb2.RUN_STATE_SUCCEEDED:
        raise typer.Exit(REFUSED)


def leave(run_id: str) -> NoReturn:
    """Ends the command at Ctrl-C, and says how to come back to the run, which goes on.

    Args:
        run_id: empty where nothing was heard of the run.
    """
    where = f"Run {run_id} goes on; 'apollo watch {run_id}' follows it, 'apollo cancel {run_id}'"
    unheard = "Nothing was heard of the run yet; 'apollo runs' shows it if it was taken."
    print(f"\n{where} ends it." if run_id else f"\n{unheard}", file=sys.stderr)
    raise typer.Exit(INTERRUPTED) from None

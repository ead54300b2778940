"""`apollo train`: learns the samples of a file, and shows the run until it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from apollo_client.client import RunStream
from apollo_client.command import display
from apollo_client.command.display import Json
from apollo_client.command.outcome import INTERRUPTED, REFUSED, reported_errors
from apollo_client.sample_files import read_placed, read_standard_input
from apollo_grpc.v1 import training_pb2


def command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="JSON lines or one array, or - for standard input.")],
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, on AdamW's scale.")] = None,
    samples_per_step: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Shuffles each epoch.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the projection.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of a rising lr.")] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Tell each sample's loss before and after.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compute each step, and write nothing.")
    ] = False,
    coherence: Annotated[
        str | None,
        typer.Option(help="live, pause_step (default) or pause_run: when vLLM waits for writes."),
    ] = None,
    cache_policy: Annotated[
        str | None,
        typer.Option(help="reset_at_end (default), reset_each_step or keep: vLLM's prefixes."),
    ] = None,
    max_loss: Annotated[float | None, typer.Option(help="A step above is not written.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    max_update_ratio: Annotated[
        float | None, typer.Option(help="Likewise: of an update's norm over the weights'.")
    ] = None,
    min_loss: Annotated[
        float | None,
        typer.Option(
            help="The run ends once each sample's latest loss is below; default 0.02 nats, 0 never."
        ),
    ] = None,
    max_wall_time: Annotated[float | None, typer.Option(help="Seconds; then the run ends.")] = None,
    reset_optimizer: Annotated[
        bool, typer.Option("--reset-optimizer", help="Drop the optimizer's state first.")
    ] = False,
    accept_other_weights: Annotated[
        bool,
        typer.Option(
            "--accept-other-weights",
            help="Go on with a state of other weights, as after vLLM restarted without a sync.",
        ),
    ] = False,
    request_id: Annotated[
        str | None,
        typer.Option(help="The same id and samples again attach to the first run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn the samples of FILE; the model serves what it learned as soon as the run has ended.

    A line is {"context": "...", "continuation": "..."}, or {"context_ids": [...],
    "continuation_ids": [...]}, or {"messages": [...]} whose last one is the assistant's; messages
    may have OpenAI's "weight": 0 or 1, and then each answer of weight 1 is learned. The
    continuation is learned, the context is read. Ctrl-C leaves the run going.
    """
    options: Any = {
        "epochs": epochs,
        "lr": lr,
        "samples_per_step": samples_per_step,
        "seed": seed,
        "rank": rank,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "evaluate": evaluate or None,
        "dry_run": dry_run or None,
        "coherence": coherence,
        "cache_policy": cache_policy,
        "max_loss": max_loss,
        "max_grad_norm": max_grad_norm,
        "max_update_ratio": max_update_ratio,
        "min_loss": min_loss,
        "max_wall_time": max_wall_time,
        "reset_optimizer": reset_optimizer or None,
        "accept_other_weights": accept_other_weights or None,
    }
    with reported_errors():
        samples = read_standard_input() if str(file) == "-" else read_placed(file)
        with context.obj.client() as client:
            events = client.train(samples, request_id=request_id, **options)
            follow(events, as_json)


def follow(stream: RunStream, as_json: bool) -> None:
    """Shows a run's events until its last; ends the command where the run did not succeed.

    Ctrl-C ends the command, too, and leaves the run going.
    """
    run_id, finished = "", training_pb2.Finished()

    def events() -> Any:
        nonlocal run_id
        for event in stream:
            run_id = event.run_id
            yield event

    try:
        if as_json:
            for event in events():
                print(display.to_json(event), flush=True)
                finished = event.finished
        else:
            finished = display.RunDisplay(Console()).follow(events())
    except KeyboardInterrupt:
        where = (
            f"Run {run_id} goes on; 'apollo watch {run_id}' follows it, 'apollo cancel {run_id}'"
        )
        where = f"{where} ends it." if run_id else "Nothing was heard of the run yet."
        print(f"\n{where}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if finished.state != training_pb2.RUN_STATE_SUCCEEDED:
        raise typer.Exit(REFUSED)

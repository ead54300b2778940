"""`apollo train`: learns the samples of a file, and shows the run until it ends."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from apollo_client.command.display import Json
from apollo_client.command.many_samples import learn
from apollo_client.command.outcome import reported_errors
from apollo_client.command.runs import Labels, read_labels
from apollo_client.forms import SAMPLES, Form
from apollo_client.placing import Placed
from apollo_client.requests import LISTS, RunOptions
from apollo_client.sample_files import read_placed, read_standard_input
from apollo_client.sample_values import shown
from apollo_grpc.errors import InvalidArgument

T = TypeVar("T")
_BOOLS = {"true": True, "false": False}


def command(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="JSON lines or one array, Parquet, or - for standard input; or --dataset."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="KEY=NAME", help="FILE's name of a key of a sample; may be repeated."
        ),
    ] = None,
    dataset_id: Annotated[
        str | None,
        typer.Option("--dataset", metavar="ID", help="Samples of 'apollo datasets', not a FILE."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples, at most.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, on AdamW's scale.")] = None,
    samples_per_step: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="cross_entropy (default), context_distillation or policy_gradient."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Shuffles each epoch.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the projection.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of a rising lr.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant (default), linear or cosine: lr after that.")
    ] = None,
    final_lr_fraction: Annotated[
        float | None, typer.Option(help="Part of lr that the schedule ends with; default 0.")
    ] = None,
    clip_grad_norm: Annotated[
        float | None, typer.Option(help="A larger gradient is scaled down to it.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Parameters that learn, such as '*.mlp.*'; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Parameters that do not; may be repeated.")
    ] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="Layer that learns, from 0; may be repeated.")
    ] = None,
    context_gradient_tokens: Annotated[
        int | None,
        typer.Option(help="Last tokens of each context that gradients flow through; default 0."),
    ] = None,
    anchors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Samples whose answers must stay as they are."),
    ] = None,
    anchor_loss: Annotated[
        str | None, typer.Option(help="kl (default): stay; replay: learn them too.")
    ] = None,
    anchor_weight: Annotated[
        float | None, typer.Option(help="Of their loss beside that of the samples; default 1.")
    ] = None,
    anchors_per_step: Annotated[
        int | None, typer.Option(help="Anchors beside a step's samples; default 2.")
    ] = None,
    regression_set: Annotated[
        bool,
        typer.Option("--regression-set", help="What 'apollo probes' lists are anchors as well."),
    ] = False,
    probes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Questions to ask before and after the run."),
    ] = None,
    accept_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Else the run is taken back: max_failed, max_lost, max_anchor_kl or "
            "forget_probes; may be repeated.",
        ),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Tell each sample's loss before and after.")
    ] = False,
    evaluation_samples: Annotated[
        Path | None,
        typer.Option("--evaluation", metavar="FILE", help="Samples to tell the losses of."),
    ] = None,
    evaluate_every_steps: Annotated[
        int | None, typer.Option("--evaluate-every", help="Steps between two evaluations.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compute each step, and write nothing.")
    ] = False,
    coherence: Annotated[
        str | None,
        typer.Option(help="live (default), pause_step or pause_run: when vLLM waits for writes."),
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
    name: Annotated[str | None, typer.Option(help="Of the run, for people.")] = None,
    labels: Labels = None,
    expected_weight_version: Annotated[
        int | None,
        typer.Option(
            "--expected-weight-version",
            "--expect",
            help="Only if the live weights have this version.",
        ),
    ] = None,
    request_id: Annotated[
        str | None,
        typer.Option(help="Again with the same, and the same samples: follows the first run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn the samples of FILE; the model serves what it learned as soon as the run has ended.

    A line is {"context": "...", "continuation": "..."}, or {"context_ids": [...],
    "continuation_ids": [...]}, or {"messages": [...]} whose last one is the assistant's; messages
    may have OpenAI's "weight": 0 or 1, and then each answer of weight 1 is learned. Or it has a
    prompt and a completion, an instruction and an output, or ShareGPT's conversations. The
    continuation is learned, the context is read. Ctrl-C leaves the run at work.

    A distillation needs "teacher_context", "teacher_context_ids" or "teacher_messages" as well, a
    policy gradient "advantages" and "sampler_log_probabilities". A probe is {"prompt": "...",
    "expected": "..."}, or has ids or messages as a sample has; also "name", "check": "contains",
    "exact" or "log_probability", and "role": "learn" or "keep".
    """
    with reported_errors():
        if (file is None) == (dataset_id is None):
            raise InvalidArgument.at("FILE", "or --dataset is needed, and not both")
        form = SAMPLES.of_columns(dict(map(_column, columns)) if columns else None)
        samples = read(file, form) if file else []
        options = _options(context.params)
        with context.obj.client() as client:
            learn(client, samples, request_id, options, as_json)


def _options(given: Mapping[str, Any]) -> Any:
    """What the run is told: each parameter of the command that `RunOptions` has."""
    options = {
        name: value
        for name, value in given.items()
        # A flag that is not there is False.
        if name in RunOptions.__annotations__ and value is not None and value is not False
    }
    for name, form in LISTS.items():
        if name in options:
            options[name] = read(options[name], form)
    if "labels" in options:
        options["labels"] = read_labels(options["labels"])
    if "accept_if" in options:
        options["accept_if"] = dict(map(_condition, options["accept_if"])) or None
    return options


def _column(pair: str) -> tuple[str, str]:
    key, _, name = pair.partition("=")
    if not (key and name):
        raise InvalidArgument.at("map", f"is {pair!r}; it must be KEY=NAME")
    return key, name


def read(file: Path, form: Form[T]) -> list[Placed[T]]:
    """What a file holds, or standard input for `-`. Raises as `read_placed`."""
    return read_standard_input(form) if str(file) == "-" else read_placed(file, form)


def _condition(word: str) -> tuple[str, Any]:
    """A field of AcceptIf and its value."""
    name, sign, value = word.partition("=")
    if not sign:
        says = f"cannot be {shown(word)}: it is KEY=VALUE, such as max_failed=0"
        raise InvalidArgument.at("--accept-if", says)
    for read in (int, float, _BOOLS.__getitem__):
        with suppress(ValueError, KeyError):
            return name, read(value)
    return name, value

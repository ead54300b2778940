"""`apollo teach`: learns facts, keeps what was known, and takes itself back where it did not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from apollo_client.command.display import Json
from apollo_client.command.outcome import reported_errors
from apollo_client.command.run_display import follow
from apollo_client.command.train import read
from apollo_client.facts import FACTS, lesson

# Of the facts, so many may stay unlearned.
MAX_FAILED = 0.1


def command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="JSON lines or one array, or - for standard input.")],
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Learn each fact as a chat as well.")
    ] = True,
    max_failed: Annotated[
        int | None, typer.Option(help="Facts that may stay unlearned; default a tenth.")
    ] = None,
    max_lost: Annotated[
        int, typer.Option(help="Facts of earlier lessons that may be lost; default 0.")
    ] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep what was learned, whatever came of it.")
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Learning rate, on AdamW's scale.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples, at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order, and of what is drawn.")] = None,
    anchor_weight: Annotated[
        float | None, typer.Option(help="Of what must stay, beside what is learned.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Teach the facts of FILE: {"prompt": "The capital of Zorvania is", "answer": "Port Lumen"}.

    A fact may have "phrasings", more prompts with their answers, and "questions", which are asked
    before and after and never learned. The model itself says what it knows of other subjects of
    the kind: that must stay. Where too few facts were learned, or earlier ones lost, everything is
    taken back. Accepted facts join the regression set, see 'apollo probes'.
    """
    with reported_errors():
        facts = [placed.value for placed in read(file, FACTS)]
        samples, options = lesson(facts, chat=chat)
        given = {"lr": lr, "epochs": epochs, "seed": seed, "anchor_weight": anchor_weight}
        told: dict[str, Any] = {**options, **{k: v for k, v in given.items() if v is not None}}
        if not keep:
            most = math.ceil(MAX_FAILED * len(facts)) if max_failed is None else max_failed
            told["accept_if"] = {"max_failed": most, "max_lost": max_lost}
        with context.obj.client() as client:
            follow(client.train(samples, **told), as_json)

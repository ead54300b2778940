"""docs/quality.md and its charts, from the JSON file of a quality run and from nothing else."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from losses_report import losses_part
from quality_charts import charts
from quality_summary import Cell, best_cells, by_variant, cells, difference, gain, mean_of

Result = dict[str, Any]
CEILING = "AdamW fp32"
FINE_EXACT = "Apollo fp32"
STOCHASTIC, NEAREST = "Apollo bf16 stochastic", "Apollo bf16 nearest"
# Pairs that answer a question: the first is judged against the second.
QUESTIONS = (
    ("Apollo fp32", CEILING, "Apollo against AdamW, both in fp32"),
    (STOCHASTIC, "AdamW bf16", "Apollo against AdamW, both purely in bf16"),
    (STOCHASTIC, CEILING, "Apollo in bf16 against the fp32 ceiling"),
    (STOCHASTIC, "Apollo fp32", "What bf16 with stochastic rounding costs Apollo"),
    ("Apollo bf16 split16", "Apollo fp32", "What bf16 with a split fp32 master costs Apollo"),
    (NEAREST, "Apollo fp32", "What bf16 rounded to nearest costs Apollo"),
    ("Apollo mini bf16 stochastic", STOCHASTIC, "Rank 1 and one factor a matrix against rank 64"),
    ("Apollo rank 16 bf16 stochastic", STOCHASTIC, "Rank 16 against rank 64"),
    ("Apollo rank 128 fp32", "Apollo fp32", "Rank 128 against rank 64"),
    ("Apollo fp32, ends by AdamW", "Apollo fp32", "Embeddings and head by AdamW, as the paper"),
    ("apollo-torch's arithmetic fp32", "Apollo fp32", "The published arithmetic against ours"),
    ("AdamW bf16 with fp32 master", CEILING, "What a bf16 forward pass costs AdamW"),
)


def write_report(
    result: Result, longer: Result | None, losses: Result | None, docs: Path
) -> list[Path]:
    """Writes the page and the charts; returns their paths.

    Args:
        longer: a result of more steps.
        losses: of the fast passes beside plain ones.
    """
    docs.mkdir(parents=True, exist_ok=True)
    contents = {**charts(result), "quality.md": _page(result, longer, losses)}
    for name, content in contents.items():
        (docs / name).write_text(content)
    return [docs / name for name in contents]


def _page(result: Result, longer: Result | None, losses: Result | None) -> str:
    parts = [
        "# What Apollo learns beside AdamW",
        _setting(result),
        "## At each variant's best learning rate",
        _best_table(result),
        "![Held-out loss over the steps](quality-curves.svg)",
        "## What was found",
        _findings(result),
        "## At every learning rate",
        _grid(result),
        "![Held-out loss over the learning rate](quality-rates.svg)",
    ]
    if longer is not None:
        parts += [f"## The same for {longer['plan']['steps']} steps", _longer(longer)]
    if "fine_tune" in result:
        parts += _fine_part(result["fine_tune"])
    if losses is not None:
        parts += losses_part(losses)
    return "\n\n".join(parts) + "\n"


def _setting(result: Result) -> str:
    plan, text = result["plan"], result["text"]
    machine, versions = result["machine"], result["versions"]
    seeds = sorted({run["seed"] for run in result["runs"]})
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"A byte-level transformer of {plan['layers']} layers of width {plan['width']}, trained "
        f"for {plan['steps']} steps of {plan['batch']} x {plan['context']} bytes on "
        f"{text['train_bytes']:,} bytes of {text['source']}, and judged by its mean loss in nats a "
        f"byte on {plan['validation_windows']} windows of {text['validation_bytes']:,} held-out "
        f"bytes. Seeds: {', '.join(map(str, seeds))}; every variant starts from the same weights "
        "and sees the same batches for a seed. For all variants alike: "
        f"betas {tuple(plan['betas'])}, weight decay {plan['weight_decay']:g}, gradients clipped "
        f"at {plan['clip']:g}, {plan['warmup_steps']} steps of warm-up, then a cosine down to "
        f"{plan['last_rate']:g} of the rate. Models in bf16 are bf16 throughout; the loss is "
        "computed in fp32.\n\n"
        f"Made by `benchmarks/quality.py` on {machine['device']} with {known}, commit "
        f"`{result['commit']}`, {result['date']}. This page is generated from its JSON file."
    )


def _best_table(result: Result) -> str:
    best = best_cells(result["runs"])
    ceiling = best.get(CEILING)
    lines = [f"| variant | best rate | loss | minus {CEILING} |", "|---|---|---|---|"]
    for variant, cell in sorted(best.items(), key=lambda item: item[1].mean):
        gap = difference(cell, ceiling).shown() if ceiling and cell is not ceiling else ""
        lines.append(f"| {variant} | {cell.lr:g} | {cell.shown()} | {gap} |")
    return "\n".join(lines) + (
        "\n\nMean ± standard deviation over the seeds; differences are taken seed by seed."
    )


def _grid(result: Result) -> str:
    table = cells(result["runs"])
    rates = sorted({lr for by_rate in table.values() for lr in by_rate})
    lines = ["| variant | " + " | ".join(f"{lr:g}" for lr in rates) + " |"]
    lines.append("|---|" + "---|" * len(rates))
    for variant, by_rate in table.items():
        row = [by_rate[lr].shown() if lr in by_rate else "" for lr in rates]
        lines.append(f"| {variant} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _findings(result: Result) -> str:
    best = best_cells(result["runs"])
    found = [_winner(best)] if best else ["Every run diverged."]
    for one, other, question in QUESTIONS:
        if one in best and other in best:
            found.append(_judged(question, best[one], best[other]))
    found += _edges(result, best)
    return "\n".join(f"- {line}" for line in found)


def _winner(best: dict[str, Cell]) -> str:
    first, *rest = sorted(best.values(), key=lambda cell: cell.mean)
    text = f"The lowest loss is that of {first.variant}: {first.shown()} at rate {first.lr:g}."
    if not rest:
        return text
    gap = difference(rest[0], first)
    noise = {True: "within", False: "beyond", None: "not comparable with"}[gap.within_noise]
    return f"{text} The next is {rest[0].variant}, {gap.shown()}, {noise} the seeds' noise."


def _judged(question: str, one: Cell, other: Cell) -> str:
    gap = difference(one, other)
    word = "loses" if gap.mean > 0 else "wins"
    if gap.within_noise:
        verdict = f"no difference beyond the seeds' noise of {gap.noise:.4f}"
        verdict += ", though every seed has this sign" if gap.same_sign else ""
    elif gap.noise is None:
        verdict = f"{one.variant} {word}; the seeds are too few to know their noise"
    else:
        verdict = f"{one.variant} **{word}**, beyond the seeds' noise of {gap.noise:.4f}"
    return f"{question}: {gap.shown()}; {verdict}."


def _longer(result: Result) -> str:
    best, seeds = best_cells(result["runs"]), {run["seed"] for run in result["runs"]}
    found = [
        _judged(question, best[one], best[other])
        for one, other, question in QUESTIONS
        if one in best and other in best
    ]
    return (
        f"Seeds: {len(seeds)}. Commit `{result['commit']}`, {result['date']}.\n\n"
        + _grid(result)
        + "\n\n"
        + "\n".join(f"- {line}" for line in found)
    )


def _edges(result: Result, best: dict[str, Cell]) -> list[str]:
    """What weakens the findings: a best rate at the end of its grid, and runs that diverged."""
    table, notes = cells(result["runs"]), []
    ends = {variant: (min(rates), max(rates)) for variant, rates in table.items()}
    at_end = [f"{v} ({c.lr:g})" for v, c in best.items() if c.lr in ends[v]]
    if at_end:
        notes.append(
            "The best rate is at the end of the grid, and one beyond it may be better, for: "
            + ", ".join(at_end)
            + "."
        )
    diverged = [f"{r['variant']} at {r['lr']:g}" for r in result["runs"] if r["final"] is None]
    if diverged:
        notes.append("Diverged: " + ", ".join(sorted(set(diverged))) + ".")
    return notes


def _fine_part(fine: Result) -> list[str]:
    text = fine["text"]
    return [
        f"## Fine-tuning at {fine['lr']:g}",
        f"One bf16 checkpoint of the model above goes on for {fine['steps']} steps at the constant "
        f"rate {fine['lr']:g} on text that it has not seen ({text['source']}, "
        f"{text['train_bytes']:,} bytes). *Movement* is the part of the fp32 run's change of the "
        "weights that was made, *length* the change's length over that of fp32, *changed* the part "
        "of the weights that are other numbers at the end.",
        _fine_table(fine),
        _fine_findings(fine),
        "![Held-out loss while fine-tuning](quality-fine-tune.svg)",
    ]


def _fine_table(fine: Result) -> str:
    lines = ["| variant | loss before | after | fall | movement | length | changed |"]
    lines.append("|---|---|---|---|---|---|---|")
    for variant, runs in by_variant(fine["runs"]).items():
        falls = [gain(run) for run in runs]
        spread = f" ± {statistics.stdev(falls):.4f}" if len(falls) > 1 else ""
        before = statistics.fmean(run["curve"][0][1] for run in runs)
        figures = [f"{before:.4f}", f"{mean_of(runs, 'final'):.4f}"]
        figures.append(f"{statistics.fmean(falls):.4f}{spread}")
        for key in ("part_of_fp32_movement", "length_over_fp32", "changed_weights"):
            figures.append(f"{mean_of(runs, key):.2f}")
        lines.append(f"| {variant} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _fine_findings(fine: Result) -> str:
    falls = {
        variant: statistics.fmean(gain(run) for run in runs)
        for variant, runs in by_variant(fine["runs"]).items()
    }
    exact = falls.get(FINE_EXACT, math.nan)
    if not exact > 0:
        return "- The loss of the fp32 run did not fall: this run shows nothing about rounding."
    return "\n".join(
        f"- {variant} brings {fall / exact:.0%} of the fall that {FINE_EXACT} brings."
        for variant, fall in falls.items()
        if variant != FINE_EXACT
    )

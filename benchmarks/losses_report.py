"""The section of docs/quality.md on fast passes, from a JSON file of gpu/bench_losses.py."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def losses_part(result: Result) -> list[str]:
    """The section's paragraphs: heading, setting, table and picture."""
    return [
        "## Fast passes beside plain ones",
        _setting(result),
        _table(result["families"]),
        "![Losses of fast and plain steps](quality-losses.svg)",
    ]


def _setting(result: Result) -> str:
    versions = result["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        "On a GPU the server takes its steps with fused norms and rotary positions, grouped "
        "attention, passes in CUDA graphs, and gradients as factors. *Plain* steps have nothing of "
        "it but the factors, *autograd* is transformers with whole gradients in `.grad`. All start "
        f"from the same random weights in bfloat16 and learn the same {result['samples']} samples "
        f"of {result['context']} + {result['learned']} tokens in each of {result['steps']} steps, "
        f"context frozen, at the constant rate {result['rate']:g}. *Noise* is the largest "
        "distance between plain runs that differ in the seed of projections and rounding alone. "
        f"Made by `benchmarks/gpu/bench_losses.py` on {result['machine']['device']} with {known}, "
        f"commit `{result['commit']}`, {result['date']}."
    )


def _table(families: dict[str, Result]) -> str:
    rows = [
        "| family | weights | loss at first | at last: fast | plain | autograd "
        "| farthest from plain: fast | autograd | noise | graphs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*rows, *(_row(*each) for each in families.items())])


def _row(name: str, family: Result) -> str:
    runs, apart = family["runs"], family["apart"]
    last = (f"{runs[run]['losses'][-1]:.3f}" for run in ("fast", "plain", "autograd"))
    far = (f"{nats:.3f}" for nats in (apart["fast"], apart["autograd"], family["noise"]))
    weights, first = f"{family['parameters'] / 1e6:.0f} M", f"{runs['plain']['losses'][0]:.2f}"
    graphs = runs["fast"]["refusal"] or str(runs["fast"]["graphs"])
    return "| " + " | ".join([name, weights, first, *last, *far, graphs]) + " |"

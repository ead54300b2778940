"""The numbers that an event holds, by the names that every sink gives them."""

from __future__ import annotations

from collections.abc import Sequence

from apollo_grpc.v1 import training_pb2

_PLAIN = (
    *("loss", "loss_sum", "tokens", "grad_norm", "update_norm", "learning_rate"),
    *("changed_fraction", "optimizer_step", "epoch", "micro_batches"),
)
# Of the contract's durations, in seconds.
_TIMES = ("forward", "backward", "optimizer", "pause", "wait")
_POLICY = ("mean_ratio", "kl", "clipped_fraction")
# Those that a step may have, always in this order.
STEP_FIGURES = (
    *_PLAIN,
    *(f"{name}_seconds" for name in _TIMES),
    "anchor_loss",
    *(f"policy_{name}" for name in _POLICY),
)


def step_figures(step: training_pb2.RunEvent.Step) -> dict[str, float]:
    """Those of a step; what it does not tell is left out."""
    found = {name: getattr(step, name) for name in _PLAIN}
    for name in _TIMES:
        found[f"{name}_seconds"] = getattr(step, f"{name}_time").ToNanoseconds() / 1e9
    if step.HasField("anchor_loss"):
        found["anchor_loss"] = step.anchor_loss
    if step.HasField("policy"):
        found |= {f"policy_{name}": getattr(step.policy, name) for name in _POLICY}
    return found


def figures(event: training_pb2.RunEvent) -> tuple[int, dict[str, float]]:
    """The step that an event speaks of, and its numbers: of a step, or means of an evaluation.

    Events of other kinds have no numbers.
    """
    if event.HasField("step"):
        return event.step.step, step_figures(event.step)
    evaluated = event.evaluated
    means = {
        "evaluated/samples": evaluated.losses,
        "evaluated/evaluation_samples": evaluated.evaluation_losses,
        "evaluated/anchors": evaluated.anchor_losses,
    }
    return evaluated.step, {name: _mean(found) for name, found in means.items() if found}


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)

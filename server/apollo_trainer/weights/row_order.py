"""Parameters whose rows vLLM keeps in another order than the model directory.

The live matrix is the parameter as it lies, so the outputs of its module come in vLLM's order, and
are put into transformers' by a hook. What is read of it by the directory's names is put into the
directory's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apollo_trainer.weights.checkpoint_plan import CheckpointPlan
from apollo_trainer.weights.manifest import LiveView, refusal

_PLACES = "live_row_of_output"


def reorder_outputs(
    model: Any, plan: CheckpointPlan, views: Mapping[str, LiveView]
) -> CheckpointPlan:
    """Has each module with such a weight give its outputs in order; returns the plan that reads it.

    Raises FailedPrecondition for a parameter that is no weight or bias of a linear layer, that is
    tied, or whose module's other parameter lies in another order.
    """
    rows = {name: view.rows for name, view in views.items() if view.rows}
    device = next(model.parameters()).device
    places = {name: torch.tensor(rows[name], device=device).argsort() for name in rows}
    for owner in {name.rpartition(".")[0] for name in rows}:
        module, own = model.get_submodule(owner), _own_rows(model, owner, rows)
        if not isinstance(module, nn.Linear) or len(own) != 1 or _tied(owner, plan):
            raise _cannot(next(name for name in rows if name.rpartition(".")[0] == owner))
        module.register_buffer(_PLACES, places[f"{owner}.weight"], persistent=False)
        module.register_forward_hook(_in_order)
    return replace(plan, places=places)


def _own_rows(
    model: Any, owner: str, rows: Mapping[str, tuple[int, ...]]
) -> set[tuple[int, ...] | None]:
    """The orders of all parameters of a module, None for one that lies as in the directory."""
    names = (name for name, _ in model.get_submodule(owner).named_parameters())
    return {rows.get(f"{owner}.{name}") for name in names}


def _tied(owner: str, plan: CheckpointPlan) -> bool:
    return any(root.rpartition(".")[0] == owner for root in plan.tied.values())


def _in_order(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    # From the module, so that a copy of the model without memory has a copy of the places too.
    return output.index_select(-1, getattr(module, _PLACES))


def _cannot(name: str) -> Exception:
    return refusal(
        "ROWS_REORDERED",
        f"vLLM keeps the rows of {name} in another order than the model directory, and that can be "
        "trained in linear layers alone, whose weight and bias are in the same order.",
    )

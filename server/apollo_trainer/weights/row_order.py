"""Parameters whose rows vLLM keeps in another order than the model directory.

The live matrix is the parameter as it lies, so the outputs of its module come in vLLM's order, and
are put into transformers' by a hook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apollo_grpc.region import Region, Runs
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan
from apollo_trainer.weights.manifest import refusal

_PLACES = "live_row_of_output"


def reorder_outputs(model: Any, plan: CheckpointPlan, regions: Mapping[str, Region]) -> None:
    """Has each module with such a weight give its outputs in order.

    Raises FailedPrecondition for a parameter that is no weight or bias of a linear layer, that is
    tied, or whose module's other parameter lies in another order.
    """
    rows = {n: region.runs for n, region in regions.items() if not _in_order(region.runs)}
    device = next(model.parameters()).device
    for owner in {name.rpartition(".")[0] for name in rows}:
        module, own = model.get_submodule(owner), _own_rows(model, owner, rows)
        weight = f"{owner}.weight"
        alike = len(own) == 1 and weight in rows and _in_order(rows[weight][1:])
        if not isinstance(module, nn.Linear) or not alike or _tied(owner, plan):
            raise _cannot(next(name for name in rows if name.rpartition(".")[0] == owner))
        places = torch.tensor(regions[weight].indices(0), device=device).argsort()
        module.register_buffer(_PLACES, places, persistent=False)
        module.register_forward_hook(_put_in_order)


def _in_order(runs: Sequence[Runs]) -> bool:
    return all(list(along) == sorted(along) for along in runs)


def _own_rows(model: Any, owner: str, rows: Mapping[str, tuple[Runs, ...]]) -> set[Runs | None]:
    """The orders of all parameters of a module, None for one that lies as in the directory."""
    names = (f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_parameters())
    return {rows[name][0] if name in rows else None for name in names}


def _tied(owner: str, plan: CheckpointPlan) -> bool:
    return any(root.rpartition(".")[0] == owner for root in plan.tied.values())


def _put_in_order(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    # From the module, so that a copy of the model without memory has a copy of the places too.
    return output.index_select(-1, getattr(module, _PLACES))


def _cannot(name: str) -> Exception:
    return refusal(
        "ROWS_REORDERED",
        f"vLLM keeps the rows of {name} in another order than the model directory, and that can be "
        "trained in linear layers alone, whose weight and bias are in the same order.",
    )

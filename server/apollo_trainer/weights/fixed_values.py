"""Values that the model directory holds and no one trains: transformers' persistent buffers.

A router's correction bias or an activation's constants: vLLM loads them, and a training model that
has zeros there would compute something else, close enough to go unseen in some models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from apollo_trainer.weights.checkpoint_plan import CheckpointPlan
from apollo_trainer.weights.loaded_files import loaded_shards
from apollo_trainer.weights.manifest import refusal


def fill_fixed_values(model: Any, plan: CheckpointPlan, directory: Path) -> None:
    """Copies the directory's values into the model's persistent buffers, in their dtypes.

    One that the directory does not hold keeps the value that transformers gives a new model, as
    it does in a model that transformers loads.

    Raises FailedPrecondition where no safetensors can be read, or a shape is another one.
    """
    if not plan.fixed:
        return
    try:
        shards = loaded_shards(directory)
    except (ValueError, OSError) as error:
        raise _unreadable(next(iter(plan.fixed)), str(error)) from error
    if not shards:
        raise _unreadable(next(iter(plan.fixed)), "the model directory has no safetensors")
    buffers = dict(model.named_buffers())
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in plan.fixed.keys() & set(file.keys()):
                    _copy(name, buffers[plan.fixed[name]], file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise _unreadable(next(iter(plan.fixed)), f"{shard.name}: {error}") from error


def _copy(name: str, buffer: torch.Tensor, value: torch.Tensor) -> None:
    if value.numel() != buffer.numel():
        raise _unreadable(name, f"it has the shape {tuple(value.shape)} there")
    with torch.no_grad():
        buffer.copy_(value.view(buffer.shape))


def _unreadable(name: str, why: str) -> Exception:
    return refusal(
        "FIXED_VALUES_UNREADABLE",
        f"The model has values that are not trained, such as {name}, and they cannot be read from "
        f"its directory: {why}.",
    )

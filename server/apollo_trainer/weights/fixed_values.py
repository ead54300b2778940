"""Values that the model directory holds and no one trains.

Transformers' persistent buffers, such as a router's correction bias or an activation's constants:
vLLM loads them, and a training model that has zeros there would compute something else, close
enough to go unseen in some models.

And *derived* parameters, such as Mamba 2's `A_log`: vLLM computes other values from them as it
loads, -exp(A_log), so that there is nothing to write an update to. Where they are few, they become
buffers of the training model. So they have no gradient and no state, and nothing writes them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from apollo_trainer.weights.checkpoint_plan import CheckpointPlan
from apollo_trainer.weights.loaded_files import loaded_shards
from apollo_trainer.weights.manifest import named, refusal

# Of all elements, all derived ones together: a model that is trained without more learns less.
MAX_DERIVED = 1e-4


def derived_parameters(plan: CheckpointPlan, computed: Collection[str]) -> list[str]:
    """Those that can stay as they are in the directory; none where they are too many.

    Args:
        computed: parameters of the plan of which vLLM's loader writes computed values only.
    """
    whole = {t.root for t in plan.tensors if t.shape == plan.roots[t.root]}
    whole -= set(plan.tied.values())
    elements = {name: math.prod(shape) for name, shape in plan.roots.items()}
    found = [name for name in plan.roots if name in computed and name in whole]
    few = sum(elements[name] for name in found) <= MAX_DERIVED * sum(elements.values())
    return found if few else []


def fix_parameters(model: Any, plan: CheckpointPlan, names: Collection[str]) -> CheckpointPlan:
    """Makes parameters of a meta model buffers, in place; returns the plan without them."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        shape = module._parameters.pop(attribute).shape
        # vLLM computes from the directory's digits; rounded to the weights' they give others.
        values = torch.empty(shape, dtype=torch.float32, device="meta")
        module.register_buffer(attribute, values)
    return replace(
        plan,
        roots={name: shape for name, shape in plan.roots.items() if name not in names},
        tensors=tuple(tensor for tensor in plan.tensors if tensor.root not in names),
        fixed=plan.fixed | {t.name: t.root for t in plan.tensors if t.root in names},
    )


def told_derived(names: Collection[str]) -> str:
    """A sentence on the derived parameters; empty where there are none."""
    if not names:
        return ""
    return (
        "vLLM computes other values of these as it loads, so that they are not trained and stay as "
        f"they are in the model directory: {named(names)}."
    )


def fill_fixed_values(
    model: Any, plan: CheckpointPlan, directory: Path, derived: Collection[str] = ()
) -> None:
    """Copies the directory's values into the model's persistent buffers, in their dtypes.

    One that the directory does not hold keeps the value that transformers gives a new model, as
    it does in a model that transformers loads.

    Args:
        derived: buffers that the directory must hold.

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
    buffers, missing = dict(model.named_buffers()), set(derived)
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in plan.fixed.keys() & set(file.keys()):
                    _copy(name, buffers[plan.fixed[name]], file.get_tensor(name))
                    missing.discard(plan.fixed[name])
        except (SafetensorError, OSError) as error:
            raise _unreadable(next(iter(plan.fixed)), f"{shard.name}: {error}") from error
    if missing:
        raise _unreadable(min(missing), "no safetensors file there holds it")


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

"""A model directory's own files as a snapshot: hard links, about no bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from apollo_trainer.checkpoints.digest import matches
from apollo_trainer.checkpoints.model_state import ModelState
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan

FOLDER = "weights"


@dataclass(frozen=True)
class SyncedFiles:
    """Files that hold the live weights, as the last sync left them.

    Attributes:
        files: all safetensors files of the model directory.
        plan: which of their tensors are which parameters.
    """

    files: tuple[Path, ...]
    plan: CheckpointPlan


def link_files(synced: SyncedFiles, folder: Path, state: ModelState) -> bool:
    """Links the files into a new folder; False, and no folder, where they are not the state's.

    Files are linked only where no sync can edit them in place meanwhile: the caller's to know.
    """
    target = folder / FOLDER
    target.mkdir()
    try:
        for file in synced.files:
            if file.is_symlink():
                raise OSError("a link to a link would follow another file")
            os.link(file, target / file.name)
        found = read_parameters(target, [f.name for f in synced.files], synced.plan)
        if all(n in found and matches(found[n], state.digest(n)) for n in state.parameters):
            return True
    except (OSError, ValueError):
        # Another filesystem, or too many links: the bytes are then written as ever.
        pass
    for file in target.iterdir():
        file.unlink()
    target.rmdir()
    return False


def read_parameters(
    folder: Path, names: Sequence[str], plan: CheckpointPlan
) -> dict[str, torch.Tensor]:
    """The parameters that checkpoint files hold, contiguous, in memory of their own.

    Raises ValueError where a tensor has another shape than its parameter, OSError and
    SafetensorError where a file cannot be read.
    """
    planned = {tensor.name: tensor for tensor in plan.tensors}
    found: dict[str, torch.Tensor] = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key not in planned and key not in plan.tied:
                    continue
                root = planned[key].root if key in planned else plan.tied[key]
                values = file.get_tensor(key)
                shape = planned[key].shape if key in planned else plan.roots[root]
                if tuple(values.shape) != tuple(shape):
                    raise ValueError(f"{key} is {list(values.shape)}")
                target = found.setdefault(root, torch.empty(plan.roots[root], dtype=values.dtype))
                if key in planned:
                    part = planned[key]
                    target = target.view(-1).as_strided(part.shape, part.stride, part.offset)
                target.copy_(values)
    return found

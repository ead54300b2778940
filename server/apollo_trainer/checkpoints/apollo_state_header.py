"""What an Apollo state on disk says of itself; read without its tensors, and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FORMAT = "apollo-state-1"
FILE_NAME = "apollo_state.safetensors"
# The same in the middle of a run: of use only with the engine that is being trained.
RUNNING_FILE_NAME = "apollo_state.running.safetensors"
# Keys of the description.
OPTIMIZER_KEY, SHAPE_KEY, WEIGHTS_KEY = "optimizer", "shape", "weights"


def read_description(path: Path) -> dict[str, Any] | None:
    """What a state says of itself, without its tensors; None where there is none to be read."""
    try:
        with safe_open(path, framework="np") as file:
            description: dict[str, Any] = json.loads((file.metadata() or {})["description"])
            return description
    except (SafetensorError, ValueError, KeyError, OSError):
        return None


def saved_epoch(path: Path) -> str:
    """The engine that a state was saved beside; empty where there is no state."""
    return str((read_description(path) or {}).get(WEIGHTS_KEY, {}).get("epoch", ""))


def saved_steps(state_dir: Path, epoch: str) -> int | None:
    """Optimizer steps of the state that an engine's weights go on with; None where none is."""
    for name in (RUNNING_FILE_NAME, FILE_NAME):
        for path in (state_dir / "models").glob(f"*/{name}"):
            state = read_description(path) or {}
            if state.get(WEIGHTS_KEY, {}).get("epoch") == epoch:
                return int(state[OPTIMIZER_KEY]["step_count"])
    return None

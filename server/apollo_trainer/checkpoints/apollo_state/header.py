"""What an Apollo state on disk says of itself; read without its tensors, and without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Covered:
    """The last run that a state knows of, by the ledger, and how many of its steps it has seen.

    An undo or a restore goes back behind them: they are not to be counted once more.
    """

    run_id: str = ""
    steps: int = 0


@dataclass(frozen=True)
class StateOf:
    """What a state says of the weights that it belongs to.

    Attributes:
        epoch: of the engine that it was saved beside.
        fingerprint: of the weights; empty in the middle of a run.
        saves: rises with each state that is saved of a model.
    """

    epoch: str = ""
    fingerprint: str = ""
    saves: int = 0
    covered: Covered = Covered()

    @classmethod
    def read(cls, description: dict[str, Any]) -> StateOf:
        """From a description; of one that says nothing, nothing."""
        found = description.get(WEIGHTS_KEY, {})
        covered = found.get("covered", {})
        return cls(
            str(found.get("epoch", "")),
            str(found.get("fingerprint", "")),
            int(found.get("saves", 0)),
            Covered(str(covered.get("run_id", "")), int(covered.get("steps", 0))),
        )


def state_of(path: Path) -> StateOf:
    """Of a file; where there is none to be read, nothing."""
    return StateOf.read(read_description(path) or {})


def newest_state(folder: Path, epoch: str) -> Path:
    """The last state that was saved beside an engine, else that of the last run."""
    running, final = folder / RUNNING_FILE_NAME, folder / FILE_NAME
    found, last = state_of(running), state_of(final)
    superseded = last.epoch == epoch and last.saves > found.saves
    return running if found.epoch == epoch and not superseded else final


def saved_steps(state_dir: Path, epoch: str) -> int | None:
    """Optimizer steps of the state that an engine's weights go on with; None where none is."""
    for folder in (state_dir / "models").glob("*"):
        state = read_description(newest_state(folder, epoch)) or {}
        if StateOf.read(state).epoch == epoch:
            return int(state[OPTIMIZER_KEY]["step_count"])
    return None

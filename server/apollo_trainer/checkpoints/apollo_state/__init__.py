"""The optimizer's state on disk, and whose weights it belongs to."""

from apollo_trainer.checkpoints.apollo_state.file import (
    load_state,
    read_state,
    save_state,
    write_state,
)
from apollo_trainer.checkpoints.apollo_state.header import (
    FILE_NAME,
    OPTIMIZER_KEY,
    RUNNING_FILE_NAME,
    SHAPE_KEY,
    WEIGHTS_KEY,
    Covered,
    StateOf,
    newest_state,
    saved_steps,
    state_of,
)

__all__ = [
    "FILE_NAME",
    "OPTIMIZER_KEY",
    "RUNNING_FILE_NAME",
    "SHAPE_KEY",
    "WEIGHTS_KEY",
    "Covered",
    "StateOf",
    "load_state",
    "newest_state",
    "read_state",
    "save_state",
    "saved_steps",
    "state_of",
    "write_state",
]

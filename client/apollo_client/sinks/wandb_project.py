"""A run of Weights & Biases."""

from __future__ import annotations

import os

from apollo_client.sinks.figures import figures
from apollo_client.sinks.places import require_library
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import training_pb2

# The figures leave this machine, and nothing of the machine, its code, packages or output.
_PRIVATE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


class WandbSink:
    """Logs each event's figures under its sequence, which wandb takes once and in order.

    A start finds how far the service has the run. With WANDB_MODE=offline nobody can say: each
    start makes a folder of its own, which is whole in itself.

    Args:
        place: the project. Who uploads, and where to, is wandb's own set-up ('wandb login').

    Attributes:
        after: sequence of the last event that the service has.
    """

    def __init__(self, place: str, run_id: str):
        # Read at the import: else its crashes are told to a third party.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = require_library("wandb", "wandb")
        try:
            settings = wandb.Settings(**_PRIVATE)
            self._run = wandb.init(project=place, id=run_id, resume="allow", settings=settings)
        except wandb.Error as error:
            raise FailedPrecondition(
                f"wandb refused: {error} Nothing was sent. Mend that, or set WANDB_MODE=offline.",
                reason="SINK_REFUSED",
            ) from None
        self._run.define_metric("*", step_metric="step")
        # The step that wandb counts from: one behind the last that it has.
        self.after = max(0, self._run.starting_step - 1)

    def write(self, event: training_pb2.RunEvent) -> None:
        """Logs the figures of a step or an evaluation; a process of wandb's own sends them."""
        step, found = figures(event)
        if found:
            self._run.log({"step": step, **found}, step=event.sequence)

    def close(self) -> None:
        """Waits until all is sent, or is in the offline folder."""
        self._run.finish()

"""What a step holds from its beginning to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from apollo_trainer.optim.change import Change
from apollo_trainer.optim.options import StepSettings
from apollo_trainer.optim.parameters import Slot


@dataclass
class OpenStep:
    """A step that was begun.

    Attributes:
        settings: of each parameter group.
        change: sums up what was written, where that is measured.
        done: names of the parameters that were stepped.
        deferred: tied parameters that wait for all their gradients, by name.
    """

    settings: list[StepSettings]
    change: Change | None
    done: set[str] = field(default_factory=set)
    deferred: dict[str, Slot] = field(default_factory=dict)

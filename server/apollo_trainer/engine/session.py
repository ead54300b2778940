"""The session: one attachment with its Apollo optimizer and its weight version."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import status_pb2
from apollo_trainer.checkpoints.apollo_state import (
    OPTIMIZER_KEY,
    RUNNING_FILE_NAME,
    SHAPE_KEY,
    WEIGHTS_KEY,
    Covered,
    StateOf,
    newest_state,
    state_of,
)
from apollo_trainer.config import Settings
from apollo_trainer.engine.model_checkpoints import ModelCheckpoints
from apollo_trainer.engine.pace import Pace
from apollo_trainer.engine.state_saver import CapturedState, StateSaver
from apollo_trainer.optim import Apollo
from apollo_trainer.requests.samples import SampleLimits
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.memory import StepMemory
from apollo_trainer.training.needs import CANNOT
from apollo_trainer.training.options import OptimizerOptions, StateShape
from apollo_trainer.training.out_of_memory import OutOfMemory
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.weights.attachment import Attachment

log = logging.getLogger(__name__)
# Of a session, what an engine that comes back finds as it was.
_CARRIED = ("other_weights", "on_disk", "captured_step", "saves", "covered")
# Of a session, what `begin_run` changes.
_BEGUN = ("optimizer", "on_disk", "shape", "other_weights")


@dataclass(frozen=True)
class KeptState:
    """The Apollo state of an engine that was lost from sight: it may come back as it was.

    Attributes:
        carried: what the session knew of that state and its files.
        mixed: why the weights were mixed.
    """

    epoch: str
    tensors: dict[str, Any]
    description: dict[str, Any]
    carried: dict[str, Any]
    mixed: str


@dataclass
class Session:
    """What the training thread works with while one engine is attached.

    Attributes:
        shape: of the live optimizer state.
        state_path: where that state is kept on disk.
        checkpoints: snapshots, undo and sync of the model.
        passes: of the model, as CUDA graphs; None where it is on no GPU.
        twin: of the model, without memory, to tell of a step's memory; None likewise.
        other_weights: why the state does not belong to the live weights; empty when it does.
        on_disk: whether a state on disk is one that a killed server could go on with.
        captured_step: of the last copy that was taken to be saved; -1 where that is of no use.
        saves: copies that were taken of this model's state, by all servers.
        covered: what the live state knows of the ledger's runs.
        came_back: whether the engine was lost from sight, and its state in memory was kept.
        from_disk: whether the ledger may know of steps that the state lacks.
        moved: whether the live weights are not those that it was saved beside, to this engine.
        found: sentences on what was found at the attachment, for the status.
        paused: that somebody else pauses vLLM, in a sentence; empty where nobody does.
        needs: sentences on what steps need of the device; empty until they are known.
        sharing: how training shares a GPU with vLLM; empty on a CPU.
        refused_forms: sentences on which forms of samples vLLM makes no tokens of.
        model_info: what callers are told of the model; nobody changes it.
        weight_version: updates of the live weights, the newest count; any thread reads it.
        pace: how long steps wait for vLLM's tokens; any thread.
    """

    attachment: Attachment
    optimizer: Apollo
    shape: StateShape
    state_path: Path
    limits: SampleLimits
    settings: Settings
    checkpoints: ModelCheckpoints
    passes: CapturedPasses | None = None
    twin: Any | None = None
    other_weights: str = ""
    on_disk: bool = False
    captured_step: int = 0
    saves: int = 0
    covered: Covered = field(default_factory=Covered)
    came_back: bool = False
    from_disk: bool = False
    moved: bool = False
    found: str = ""
    paused: str = ""
    needs: str = ""
    sharing: str = ""
    refused_forms: str = ""
    model_info: status_pb2.ModelInfo = field(default_factory=status_pb2.ModelInfo)
    weight_version: int = field(init=False)
    pace: Pace = field(init=False)
    _counting: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.weight_version = self.attachment.weight_version
        self.pace = Pace(self.settings.serving_share)

    def count_version(self, version: int) -> None:
        """Raises the weight version to that of the sidecar; never lowers it. Any thread."""
        with self._counting:
            self.weight_version = max(self.weight_version, version)

    def require_accepted(self, options: OptimizerOptions) -> None:
        """Raises FailedPrecondition when a run would go on with a state of other weights."""
        if self.other_weights and not (options.reset or options.accept_other_weights):
            raise FailedPrecondition(
                f"{self.other_weights} Nothing was written. Bring back the weights that it belongs "
                "to, or send the run with accept_other_weights to go on with this state, or with "
                "reset_optimizer to begin a new one.",
                reason="STATE_OF_OTHER_WEIGHTS",
            )

    def require_sound(self, options: OptimizerOptions | None = None) -> None:
        """Raises FailedPrecondition while weights and state are not one model's.

        Args:
            options: of the run that would go on with them.
        """
        self.checkpoints.poison.require_sound()
        self.require_accepted(options or OptimizerOptions())

    def new_optimizer(self, shape: StateShape) -> Apollo:
        """Makes an optimizer without history for the live weights."""
        self.attachment.ranks.tell("optimizer", shape=vars(shape), state="")
        optimizer = new_optimizer(self.attachment, shape, self.settings)
        optimizer.before_param_write = self.checkpoints.watch
        return optimizer

    def extra(self) -> dict[str, Any]:
        """Returns what a snapshot keeps beside weights and state."""
        return {"shape": vars(self.shape), "weight_version": self.weight_version}

    def begin_run(self, options: OptimizerOptions, steps: int = 0) -> None:
        """Makes the optimizer what the run asks for. Raises FailedPrecondition on a mismatch.

        Args:
            steps: of the run, over which its schedule goes.
        """
        self.require_sound(options)
        shape = options.shape_on(self.shape)
        if options.reset:
            self.optimizer = self.new_optimizer(shape)
        # Until it is saved, the state on disk is another one than this.
        self.on_disk = self.on_disk and not (options.reset or self.other_weights)
        self.shape, self.other_weights = shape, ""
        self.optimizer.rounding = self.shape.rounding
        options.apply(self.optimizer, steps)

    @contextmanager
    def trying(self, options: OptimizerOptions, steps: int = 0) -> Iterator[None]:
        """Begins a dry run as `begin_run` does; afterwards all is as it was."""
        before, rounding = {name: getattr(self, name) for name in _BEGUN}, self.optimizer.rounding
        groups = [dict(group) for group in self.optimizer.param_groups]
        try:
            self.begin_run(options, steps)
            yield
        finally:
            if self.optimizer is not before["optimizer"]:
                self.attachment.ranks.tell("former_optimizer")
            vars(self).update(before)
            self.optimizer.rounding = rounding
            for group, values in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(values)

    def with_needs(self, error: OutOfMemory, samples: Sequence[TokenizedSample]) -> OutOfMemory:
        """Adds to the refusal of a step what its samples need, where that can be known."""
        if self.twin is None:
            return error
        try:
            needed = self.step_memory().step_bytes(samples)
        except CANNOT:
            return error
        return error.with_needs(needed, torch.cuda.mem_get_info()[0])

    def step_memory(self) -> StepMemory:
        """Returns what tells a step's memory, with a twin."""
        return StepMemory(self.twin, self.shape, self.settings.token_budget)

    def capture(self, *, running: bool) -> CapturedState:
        """Copies the Apollo state, for the saver to put on disk.

        Args:
            running: in the middle of a run. Such a state has its own file and is of use with this
                engine alone: if the engine is lost, the state of before the run is the one that
                belongs to the model directory. Any other state is saved with the fingerprint of
                its weights.
        """
        tensors, description = self.optimizer.state_to_save()
        self.saves, self.captured_step = self.saves + 1, self.optimizer.step_count
        found = "" if running else self.attachment.fingerprint()
        weights = StateOf(self.attachment.epoch, found, self.saves, self.covered)
        running_path = self.state_path.with_name(RUNNING_FILE_NAME)
        return CapturedState(
            path=running_path if running else self.state_path,
            tensors={n: t.detach().to("cpu", copy=True) for n, t in tensors.items()},
            description=self._described(description) | {WEIGHTS_KEY: asdict(weights)},
            optimizer_step=self.optimizer.step_count,
            supersedes=None if running else running_path,
        )

    def save(self, saver: StateSaver, *, running: bool = False) -> str:
        """Puts the live state on disk and waits; returns why that failed, or an empty string.

        From then on a server that is killed goes on with weights and state together.
        """
        error = saver.save_and_wait(self.capture(running=running)).error
        self.on_disk = not error
        return error or self.checkpoints.end_restore()

    def is_saved(self) -> bool:
        """Whether the live state is on disk. Reads a header; the saver must be idle."""
        saves = state_of(newest_state(self.state_path.parent, self.attachment.epoch)).saves
        return (self.captured_step, self.saves) == (self.optimizer.step_count, saves)

    def catch_up(self, steps: int, *, in_doubt: bool) -> None:
        """Counts steps that are in the weights and not in the state, if they explain the weights.

        Args:
            in_doubt: one step more may be in the weights, wholly or in part.
        """
        if self.moved and not (steps or in_doubt or self.checkpoints.poison.why):
            self.other_weights = weights_are_others(self.optimizer.step_count)
        elif steps or self.moved:
            message = "the weights are ahead of the Apollo state, which is that of step %d, by %d"
            log.warning(message, self.optimizer.step_count, steps)
            self.optimizer.step_count += steps
            self.captured_step = -1

    def keep(self) -> KeptState | None:
        """Returns the state in memory, apart from the engine's; None where that has no whole."""
        if self.attachment.ranks.size > 1:
            return None  # The others end with the engine, or have ended.
        try:
            tensors, description = self.optimizer.named_state()
        except RuntimeError:
            return None
        carried, of = {n: getattr(self, n) for n in _CARRIED}, self._described(description)
        return KeptState(self.attachment.epoch, tensors, of, carried, self.checkpoints.poison.why)

    def _described(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        return {OPTIMIZER_KEY: optimizer, SHAPE_KEY: vars(self.shape)}


def new_optimizer(attachment: Attachment, shape: StateShape, settings: Settings) -> Apollo:
    """Makes an optimizer without history over the live parameters.

    Raises FailedPrecondition where the weights cannot be trained with such a state.
    """
    try:
        optimizer = Apollo(
            attachment.model.named_parameters(),
            rank=shape.rank,
            variant=shape.variant,
            rounding=shape.rounding,
            seed=settings.seed,
            regions=attachment.regions,
            ranks=attachment.ranks,
        )
    except ValueError as error:
        raise FailedPrecondition(
            f"The optimizer state {shape} does not suit the served model: {error} Nothing was "
            "changed.",
            reason="OPTIMIZER_UNSUITABLE",
        ) from error
    optimizer.measure = True
    return optimizer


def weights_are_others(step: int) -> str:
    """Says why a state of that step is not that of the live weights."""
    return (
        f"The Apollo state on disk is that of step {step} of other weights than those that vLLM "
        "serves: they were lost with an engine before a sync, somebody else wrote to them (another "
        "training server, a reload), or the model directory was changed."
    )

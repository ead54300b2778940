"""One attachment made trainable: its tokenizer, its limits and its Apollo optimizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import status_pb2
from apollo_trainer.checkpoints.apollo_state import load_state
from apollo_trainer.checkpoints.apollo_state_header import (
    FILE_NAME,
    OPTIMIZER_KEY,
    RUNNING_FILE_NAME,
    SHAPE_KEY,
    WEIGHTS_KEY,
    saved_epoch,
)
from apollo_trainer.config import Settings
from apollo_trainer.optim import Apollo
from apollo_trainer.runs.model_checkpoints import ModelCheckpoints
from apollo_trainer.runs.state_saver import CapturedState
from apollo_trainer.training.context_check import require_frozen_context
from apollo_trainer.training.options import OptimizerOptions, StateShape
from apollo_trainer.training.samples import SampleLimits
from apollo_trainer.weights.attach import Attachment
from apollo_trainer.weights.fingerprint import fingerprint
from apollo_trainer.weights.verify import probe_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptState:
    """The Apollo state of an engine that was lost from sight: it may come back as it was."""

    epoch: str
    tensors: dict[str, Any]
    description: dict[str, Any]
    other_weights: str


@dataclass
class Session:
    """What the training thread works with while one engine is attached.

    Attributes:
        shape: of the live optimizer state.
        state_path: where that state is kept on disk.
        tokenizer: of the served model; None where its directory has none.
        checkpoints: the ways back to what the model was.
        other_weights: why the state does not belong to the live weights; empty when it does.
        on_disk: whether a state on disk is one that a killed server could go on with.
        captured_step: of the last copy that was taken to be saved; -1 where none was.
    """

    attachment: Attachment
    optimizer: Apollo
    shape: StateShape
    state_path: Path
    tokenizer: Any
    limits: SampleLimits
    settings: Settings
    checkpoints: ModelCheckpoints
    other_weights: str = ""
    on_disk: bool = False
    captured_step: int = -1

    def require_accepted(self, options: OptimizerOptions) -> None:
        """Raises FailedPrecondition when a run would go on with a state of other weights."""
        if self.other_weights and not (options.reset or options.accept_other_weights):
            raise FailedPrecondition(
                f"{self.other_weights} Nothing was written. Bring back the weights that it belongs "
                "to, or send the run with accept_other_weights to go on with this state, or with "
                "reset_optimizer to begin a new one.",
                reason="STATE_OF_OTHER_WEIGHTS",
            )

    def require_sound(self) -> None:
        """Raises FailedPrecondition while weights and state are not one model's."""
        self.checkpoints.poison.require_sound()
        self.require_accepted(OptimizerOptions())

    def optimizer_of(self, shape: StateShape) -> Apollo:
        """The live optimizer where its state has that shape, else a new one."""
        if shape == self.shape:
            return self.optimizer
        return self._new_optimizer(shape)

    def _new_optimizer(self, shape: StateShape) -> Apollo:
        optimizer = new_optimizer(self.attachment, shape, self.settings)
        optimizer.before_param_write = self.checkpoints.watch
        return optimizer

    def extra(self, weight_version: int) -> dict[str, Any]:
        """What a snapshot keeps beside weights and state."""
        return {"shape": vars(self.shape), "weight_version": weight_version}

    def begin_run(self, options: OptimizerOptions) -> None:
        """Makes the optimizer what the run asks for. Raises FailedPrecondition on a mismatch."""
        self.checkpoints.poison.require_sound()
        self.require_accepted(options)
        shape = options.shape_on(self.shape)
        if options.reset:
            self.optimizer = self._new_optimizer(shape)
        # Until it is saved, the state on disk is another one than this.
        self.on_disk = self.on_disk and not (options.reset or self.other_weights)
        self.shape, self.other_weights = shape, ""
        self.optimizer.rounding = self.shape.rounding
        options.apply(self.optimizer)

    @contextmanager
    def trying(self, options: OptimizerOptions) -> Iterator[None]:
        """The optimizer as `begin_run` makes it, for a dry run; afterwards all is as it was."""
        before, rounding = dict(vars(self)), self.optimizer.rounding
        groups = [dict(group) for group in self.optimizer.param_groups]
        try:
            self.begin_run(options)
            yield
        finally:
            vars(self).update(before)
            self.optimizer.rounding = rounding
            for group, values in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(values)

    def show(self, status: status_pb2.ServerStatus) -> None:
        """Puts the optimizer into a status."""
        status.optimizer_loaded = not self.other_weights
        status.optimizer_step = self.optimizer.step_count
        status.state_size_bytes = self.optimizer.state_size_bytes()

    def capture(self, *, running: bool) -> CapturedState:
        """A copy of the Apollo state, to be put on disk by whoever has the time.

        Args:
            running: in the middle of a run. Such a state has a file of its own and is of use with
                this engine alone: the one of before the run is what belongs to the model
                directory, should the engine be lost. Otherwise the fingerprint of the weights
                that it belongs to goes with it.
        """
        tensors, description = self.optimizer.named_state()
        weights = {"epoch": self.attachment.epoch}
        if not running:
            weights["fingerprint"] = fingerprint(self.attachment.parameters())
        running_path = self.state_path.with_name(RUNNING_FILE_NAME)
        self.captured_step = self.optimizer.step_count
        return CapturedState(
            path=running_path if running else self.state_path,
            tensors={n: t.detach().to("cpu", copy=True) for n, t in tensors.items()},
            description={
                OPTIMIZER_KEY: description,
                SHAPE_KEY: vars(self.shape),
                WEIGHTS_KEY: weights,
            },
            optimizer_step=self.optimizer.step_count,
            supersedes=None if running else running_path,
        )

    def keep(self) -> KeptState | None:
        """The state in memory, without a hold on the engine's; None in the middle of a step."""
        try:
            tensors, description = self.optimizer.named_state()
        except RuntimeError:
            return None
        wrapped = {OPTIMIZER_KEY: description, SHAPE_KEY: vars(self.shape)}
        return KeptState(self.attachment.epoch, tensors, wrapped, self.other_weights)


def open_session(
    attachment: Attachment, settings: Settings, kept: KeptState | None = None
) -> Session:
    """The session of a new attachment, with the Apollo state that belongs to its weights.

    Args:
        kept: of an engine that was lost; taken when it is this one, else the state on disk is.

    Raises FailedPrecondition when the model cannot learn after a frozen context, or the state on
    disk is unreadable or of another model.
    """
    require_frozen_context(
        attachment.model, probe_tokens(attachment.model, attachment.max_model_len)
    )
    state_path = _state_path(settings.state_dir, attachment.directory)
    came_back = kept is not None and kept.epoch == attachment.epoch
    newest = _newest(state_path, attachment.epoch)
    on_disk = (kept.tensors, kept.description) if kept and came_back else load_state(newest)
    shape = configured = StateShape(settings.rank, settings.variant, settings.rounding)
    if on_disk:
        shape = StateShape(**on_disk[1][SHAPE_KEY])
    if shape != configured:
        log.warning(
            "the Apollo state on disk is %s; the settings %s are for new ones", shape, configured
        )
    optimizer = new_optimizer(attachment, shape, settings)
    if on_disk:
        _restore(optimizer, state_path, *on_disk)
    embedding = attachment.model.get_input_embeddings().weight
    limits = SampleLimits(embedding.shape[0], attachment.max_model_len, settings.max_samples)
    tokenizer = _tokenizer(attachment.directory)
    checkpoints = ModelCheckpoints(attachment, state_path.parent, settings)
    optimizer.before_param_write = checkpoints.watch
    session = Session(
        attachment, optimizer, shape, state_path, tokenizer, limits, settings, checkpoints
    )
    if kept and came_back:
        session.other_weights = kept.other_weights
    elif on_disk:
        session.other_weights = _other_weights(on_disk[1], attachment, optimizer.step_count)
    session.on_disk = saved_epoch(newest) == attachment.epoch
    return session


def _newest(state_path: Path, epoch: str) -> Path:
    """The file of a run that this engine was being trained in, else that of the last run."""
    running = state_path.with_name(RUNNING_FILE_NAME)
    return running if saved_epoch(running) == epoch else state_path


def _other_weights(description: dict[str, Any], attachment: Attachment, step: int) -> str:
    """Why a state on disk is not that of the live weights; empty where it is, or may go on."""
    weights = description.get(WEIGHTS_KEY, {})
    if weights.get("fingerprint") == fingerprint(attachment.parameters()):
        return ""
    if weights.get("epoch") == attachment.epoch:
        # A training server that was killed: what it wrote after the save is in the weights.
        log.warning("the weights are ahead of the Apollo state, which is that of step %d", step)
        return ""
    return (
        f"The Apollo state on disk is that of step {step} of other weights than those that vLLM "
        "serves: they were lost with an engine before a sync, or the model directory was changed."
    )


def new_optimizer(attachment: Attachment, shape: StateShape, settings: Settings) -> Apollo:
    """An optimizer without history over the live parameters.

    Raises FailedPrecondition where the weights cannot be trained with such a state.
    """
    try:
        optimizer = Apollo(
            attachment.model.named_parameters(),
            rank=shape.rank,
            variant=shape.variant,
            rounding=shape.rounding,
            seed=settings.seed,
        )
    except ValueError as error:
        raise FailedPrecondition(
            f"The optimizer state {shape} does not suit the served model: {error} Nothing was "
            "changed.",
            reason="OPTIMIZER_UNSUITABLE",
        ) from error
    optimizer.measure = True
    return optimizer


def _restore(
    optimizer: Apollo, path: Path, tensors: dict[str, Any], description: dict[str, Any]
) -> None:
    try:
        optimizer.load_named_state(tensors, description[OPTIMIZER_KEY])
    except ValueError as error:
        raise FailedPrecondition(
            f"The Apollo state {path} does not fit the model that vLLM serves ({error}); it was "
            "left as it is, and nothing is trained. Move it away to begin with a new state.",
            reason="STATE_OF_ANOTHER_MODEL",
        ) from error
    log.info("restored the Apollo state at step %d from %s", optimizer.step_count, path)


def _state_path(state_dir: Path, model_directory: str) -> Path:
    """One folder a model directory; the digest keeps two directories of one name apart."""
    directory = Path(model_directory)
    resolved = str(directory.resolve() if directory.exists() else directory)
    digest = hashlib.sha256(resolved.encode()).hexdigest()[:12]
    return state_dir / "models" / f"{directory.name}-{digest}" / FILE_NAME


def _tokenizer(directory: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError):
        log.warning("the served model has no tokenizer: samples must be token ids")
        return None

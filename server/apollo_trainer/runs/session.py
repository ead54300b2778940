"""One attachment made trainable: its tokenizer, its limits and its Apollo optimizer."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import status_pb2
from apollo_trainer.checkpoints.apollo_state import FILE_NAME, load_state, save_state
from apollo_trainer.config import Settings
from apollo_trainer.optim import Apollo
from apollo_trainer.training.context_check import require_frozen_context
from apollo_trainer.training.options import OptimizerOptions, StateShape
from apollo_trainer.training.samples import SampleLimits
from apollo_trainer.weights.attach import Attachment
from apollo_trainer.weights.verify import probe_tokens

log = logging.getLogger(__name__)
SHAPE_KEY = "shape"
OPTIMIZER_KEY = "optimizer"


@dataclass
class Session:
    """What the training thread works with while one engine is attached.

    Attributes:
        shape: of the live optimizer state.
        state_path: where that state is kept on disk.
        tokenizer: of the served model; None where its directory has none.
    """

    attachment: Attachment
    optimizer: Apollo
    shape: StateShape
    state_path: Path
    tokenizer: Any
    limits: SampleLimits
    settings: Settings

    def begin_run(self, options: OptimizerOptions) -> None:
        """Makes the optimizer what the run asks for. Raises FailedPrecondition on a mismatch."""
        shape = options.shape_on(self.shape)
        if options.reset:
            self.optimizer = new_optimizer(self.attachment, shape, self.settings)
        self.shape = shape
        self.optimizer.rounding = self.shape.rounding
        options.apply(self.optimizer)

    def show(self, status: status_pb2.ServerStatus) -> None:
        """Puts the optimizer into a status."""
        status.optimizer_loaded = True
        status.optimizer_step = self.optimizer.step_count
        status.state_size_bytes = self.optimizer.state_size_bytes()

    def save(self) -> int:
        """Puts the Apollo state on disk, durably; returns the file's bytes. Raises OSError."""
        tensors, description = self.optimizer.named_state()
        wrapped = {OPTIMIZER_KEY: description, SHAPE_KEY: vars(self.shape)}
        return save_state(self.state_path, tensors, wrapped)


def open_session(attachment: Attachment, settings: Settings) -> Session:
    """The session of a new attachment, its Apollo state restored from disk where there is one.

    Raises FailedPrecondition when the model cannot learn after a frozen context, or the state on
    disk is unreadable or of another model.
    """
    require_frozen_context(
        attachment.model, probe_tokens(attachment.model, attachment.max_model_len)
    )
    state_path = _state_path(settings.state_dir, attachment.directory)
    on_disk = load_state(state_path)
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
    return Session(attachment, optimizer, shape, state_path, tokenizer, limits, settings)


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

"""Opens the session of a new attachment: finds the Apollo state that belongs to its weights."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from apollo_grpc.errors import ApolloError, FailedPrecondition, Internal, Unavailable
from apollo_trainer.checkpoints.apollo_state import (
    FILE_NAME,
    OPTIMIZER_KEY,
    RUNNING_FILE_NAME,
    SHAPE_KEY,
    StateOf,
    load_state,
    newest_state,
    state_of,
)
from apollo_trainer.config import Settings
from apollo_trainer.engine.model_checkpoints import ModelCheckpoints
from apollo_trainer.engine.other_ranks import OtherRanks
from apollo_trainer.engine.pace import sharing_of
from apollo_trainer.engine.session import KeptState, Session, new_optimizer, weights_are_others
from apollo_trainer.optim import Apollo
from apollo_trainer.parallel.vocabulary import vocabulary_size
from apollo_trainer.requests.samples import SampleLimits, why_refused
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.context_check import require_frozen_context
from apollo_trainer.training.delta_rule import choose_delta_rule
from apollo_trainer.training.device_part import part_of
from apollo_trainer.training.faster import speed_up
from apollo_trainer.training.narrow_products import widen_narrow_products
from apollo_trainer.training.needs import CANNOT, told
from apollo_trainer.training.options import StateShape
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import take_step
from apollo_trainer.training.step_policy import StepPolicy
from apollo_trainer.training.twin import twin_of
from apollo_trainer.weights.attach import Checks
from apollo_trainer.weights.attachment import Attachment
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.verify import probe_tokens

log = logging.getLogger(__name__)
# Tokens of the step that has kernels compiled: a context, and what is learned.
_TRIED = (1024, 128)
# Triton compiles others for lengths that this divides.
_DIVIDES = 16


def open_session(
    attachment: Attachment,
    settings: Settings,
    kept: KeptState | None = None,
    others: OtherRanks | None = None,
) -> Session:
    """Opens the session of a new attachment, with the Apollo state that belongs to its weights.

    Args:
        kept: the state of an engine that was lost; used when it is this engine, else the state on
            disk is.
        others: the other ranks, which do what is done here until now by themselves.

    Raises FailedPrecondition when the model cannot learn after a frozen context, or the state on
    disk is unreadable or of another model.
    """
    require_frozen_context(
        attachment.model, probe_tokens(attachment.model, attachment.max_model_len)
    )
    if others is not None:
        others.listen()
    state_path = _state_path(settings.state_dir, attachment.directory)
    came_back = kept is not None and kept.epoch == attachment.epoch
    newest = newest_state(state_path.parent, attachment.epoch)
    on_disk = (kept.tensors, kept.description) if kept and came_back else load_state(newest)
    shape = configured = StateShape(settings.rank, settings.variant, settings.rounding)
    if on_disk:
        shape = StateShape(**on_disk[1][SHAPE_KEY])
    else:
        _tell_of_other_paths(state_path)
    if shape != configured:
        log.warning(
            "the Apollo state on disk is %s; the settings %s are for new ones", shape, configured
        )
    state = str(newest) if on_disk else ""
    attachment.ranks.tell("optimizer", shape=vars(shape), state=state)
    optimizer = new_optimizer(attachment, shape, settings)
    if on_disk:
        _restore(optimizer, state_path, *on_disk)
    embedding = attachment.model.get_input_embeddings().weight
    limits = SampleLimits(
        vocabulary_size(attachment.model), attachment.max_model_len, settings.max_samples
    )
    checkpoints = ModelCheckpoints(attachment, state_path.parent, settings)
    optimizer.before_param_write = checkpoints.watch
    passes = twin = part = None
    if embedding.is_cuda and attachment.ranks.size == 1:
        speed_up(attachment.model)
        part = part_of(embedding.device, settings.gpu_percent)
        passes, twin = CapturedPasses(attachment.model, part), _twin(attachment.model)
    session = Session(
        attachment, optimizer, shape, state_path, limits, settings, checkpoints, passes, twin,
    )  # fmt: skip
    if embedding.is_cuda:
        session.pace.part = part
        session.sharing = sharing_of(os.environ, part.percent if part else None)
    if kept and came_back:
        vars(session).update(kept.carried, came_back=True)
        checkpoints.poison.why = kept.mixed
        return session
    session.captured_step = optimizer.step_count
    session.saves = max(
        state_of(state_path.with_name(name)).saves for name in (FILE_NAME, RUNNING_FILE_NAME)
    )
    if on_disk:
        _compare(session, StateOf.read(on_disk[1]))
    return session


def checks_of(settings: Settings, *, probed: bool) -> Checks:
    """What an attachment is asked to prove.

    Args:
        probed: the same engine was shown to be live before.
    """
    return Checks(
        values=settings.check_values,
        all_values=settings.check_all_values,
        liveness=settings.probe_weights and not probed,
        lease_seconds=settings.lease_seconds,
    )


def _twin(model: Any) -> Any | None:
    try:
        return twin_of(model)
    except CANNOT as error:
        log.info("it is not known what a step needs of the device: %s", error)
        return None


def _compare(session: Session, state: StateOf) -> None:
    """Finds out whether a state on disk belongs to the live weights."""
    attachment = session.attachment
    session.from_disk, session.covered = True, state.covered
    session.on_disk = state.epoch == attachment.epoch
    if state.fingerprint and state.fingerprint == attachment.fingerprint():
        # A restore that was cut off had then not begun to write, or was whole and saved.
        session.checkpoints.end_restore()
    elif session.on_disk and not state.fingerprint:
        # Of the middle of a run; whole, it is of use with the next engine too.
        session.captured_step = -1
    elif session.on_disk:
        session.moved = True
    else:
        session.other_weights = weights_are_others(session.optimizer.step_count)


def doubt(session: Session) -> None:
    """Decides whose the weights are where others changed them, without steps of the ledger."""
    if not session.from_disk:
        return
    # Its digest of the weights was compared: either it is not of these, or it is not whole.
    if session.moved or session.captured_step < 0:
        session.other_weights = weights_are_others(session.optimizer.step_count)
    session.moved = session.from_disk = False


def refused_forms(sidecar: Sidecar) -> str:
    """Returns sentences on which forms of samples vLLM makes no tokens of, and logs them."""
    try:
        found = why_refused(sidecar.tokenize)
    except ApolloError as error:
        # Each sample is asked about anyway.
        log.warning("it is not known whether vLLM makes tokens of samples: %s", error.message)
        return ""
    if found:
        log.warning("%s", found)
    else:
        log.info("vLLM makes the token ids of texts and chats as of its own prompts")
    return found


def prepare(model: Any) -> str:
    """Has a device compute a model's parts by what is right there; a sentence on it, or empty."""
    if model.device.type == "cuda":
        return choose_delta_rule(model)
    widen_narrow_products()
    return ""


def look_ahead(session: Session, compiling: Thread) -> None:
    """Does on a GPU what the first run would wait for; nothing elsewhere. Training thread.

    Args:
        compiling: compiles for the optimizer; waited for.
    """
    if session.twin is not None:
        find_needs(session)
        compile_passes(session)
        compiling.join()


def find_needs(session: Session) -> None:
    """Finds out what steps need of the device, in some seconds of computing."""
    try:
        free, _ = torch.cuda.mem_get_info()
        sentences = told(session.step_memory(), session.limits.max_tokens, free)
    except CANNOT as error:
        log.info("it is not known what a step needs of the device: %s", error)
        return
    session.needs = " ".join(sentences)
    for sentence in sentences:
        log.info("%s", sentence)


def compile_passes(session: Session) -> None:
    """Compiles the kernels of the model's passes by steps that are never written.

    It takes seconds where no cache on disk has them. Training thread, while no run is at work.
    """
    began, policy = time.monotonic(), StepPolicy(dry_run=True)
    try:
        for context, learned in _lengths(session.limits.max_tokens):
            sample = TokenizedSample((1,) * context, (1,) * learned)
            take_step(session.attachment.model, session.optimizer, [sample], policy)
        log.info("the kernels of steps are compiled, in %.1f s", time.monotonic() - began)
    except ApolloError as error:
        log.info("the first step compiles its kernels: %s", error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _lengths(most: int) -> Iterator[tuple[int, int]]:
    """Of both kinds, a context's and of what is learned, which begins at the context's last."""
    share = min(1.0, most / sum(_TRIED))
    context, learned = (max(1, int(share * count) // _DIVIDES) * _DIVIDES for count in _TRIED)
    yield context + 1, learned
    yield context - 2, learned - 3


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
    """Each model directory has a folder; the digest keeps two directories of one name apart."""
    directory = Path(model_directory)
    resolved = str(directory.resolve() if directory.exists() else directory)
    digest = hashlib.sha256(resolved.encode()).hexdigest()[:12]
    return state_dir / "models" / f"{directory.name}-{digest}" / FILE_NAME


def _tell_of_other_paths(state_path: Path) -> None:
    """Warns where a directory of this name had a state at another path: it may be the same one."""
    name, _, _ = state_path.parent.name.rpartition("-")
    states = state_path.parent.parent.glob(f"{glob.escape(name)}-*/{FILE_NAME}")
    for path in (each for each in states if each.parent.name.rpartition("-")[0] == name):
        log.warning(
            "a new optimizer begins at step 0; %s is of a model directory of the same name at "
            "another path. If that one was moved here, stop this server and rename the folder to "
            "%s before anything is trained.",
            path.parent, state_path.parent.name,
        )  # fmt: skip


def mistake(error: Exception) -> Internal:
    """What an attachment is refused with that failed by an error of no domain."""
    return Internal(
        f"The attachment failed by a mistake of the server's ({type(error).__name__}); its log has "
        "the details. Nothing was written."
    )


def gone() -> Unavailable:
    """What ended an attachment that can be tried again."""
    return Unavailable(
        "vLLM or a trainer rank went while weights were mapped.", reason="ENGINE_LOST"
    )

"""Attach: manifest, map, views, model, verify. All of it, or nothing is trained."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_grpc.generation import FIRST, SharedGeneration
from apollo_trainer.weights import manifest as manifests
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan, plan_checkpoint
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.directory_names import held_names
from apollo_trainer.weights.fingerprint import sample
from apollo_trainer.weights.fixed_values import (
    derived_parameters,
    fill_fixed_values,
    fix_parameters,
)
from apollo_trainer.weights.live_model import fill_with_views, meta_model
from apollo_trainer.weights.liveness import Liveness, Probed, probe_liveness
from apollo_trainer.weights.mapping import Mapping, MemoryUse, map_buffers, measure
from apollo_trainer.weights.producer import Producer
from apollo_trainer.weights.row_order import reorder_outputs
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.values import require_checkpoint_values
from apollo_trainer.weights.verify import (
    FLOOR_NATS,
    allowed,
    log_probabilities,
    noise_of,
    probe_tokens,
    require_agreement,
    weights_dtype,
)

log = logging.getLogger(__name__)
# The sidecar grants no longer lease.
LONGEST_LEASE_SECONDS = 60.0
RESUMED_POLL_SECONDS = 0.1
CHANGED_BY_OTHERS = (
    "Somebody else changed vLLM's weights since they were attached (a reload, a weight transfer, a "
    "sleep), and nothing was written to them since. They are attached again by themselves. Then a "
    "run is taken if they are those of the Apollo state, else with accept_other_weights or "
    "reset_optimizer."
)


@dataclass(frozen=True)
class MapReport:
    """What the trace of vLLM's loader found.

    Attributes:
        architecture: class of the transformers model.
        parameters: of that model, tied ones once.
        views: how many of them are views of vLLM's tensors.
        derived: those that are none and stay as they are in the model directory.
    """

    architecture: str
    parameters: int
    views: int
    derived: list[str]


@dataclass
class Attachment:
    """One engine's live weights as a transformers model.

    Attributes:
        epoch: of the engine process; with another one all of this is dead.
        directory: the model directory that vLLM serves.
        model: transformers model whose parameters are the live weights.
        plan: how parameters make checkpoint tensors.
        derived: parameters that vLLM computes other values of; they are buffers here.
        producer: the process that owns the memory.
        logprob_difference: between both sides when attached, in nats.
        allowed: how far apart rounding brings right scores, as `verify.allowed`; as last measured.
        liveness: what a probe found; None where none was made.
        generation: how often others changed the weights; None where nobody tells.
        found_generation: that of the manifest.
        lost: set once the engine is known to be gone, wedged, or not to be trusted.
        not_live: why it is not to be trusted; empty where it is.
    """

    epoch: str
    directory: str
    max_model_len: int
    weight_version: int
    model: Any
    plan: CheckpointPlan
    mappings: dict[int, Mapping]
    producer: Producer
    derived: list[str] = field(default_factory=list)
    logprob_difference: float = 0.0
    allowed: torch.Tensor = field(default_factory=lambda: torch.tensor(FLOOR_NATS))
    liveness: Liveness | None = None
    lost: threading.Event = field(default_factory=threading.Event)
    not_live: str = ""
    generation: SharedGeneration | None = None
    found_generation: int = FIRST
    _left: torch.Tensor | None = None
    _found_changed: bool = False

    @property
    def gone(self) -> bool:
        """Whether the engine is lost, or its process has ended."""
        return self.lost.is_set() or not self.producer.alive

    @property
    def changed_by_others(self) -> bool:
        """Whether somebody else has changed the weights, or begins to, since the manifest."""
        if self.generation is not None and self.generation.now != self.found_generation:
            self._found_changed = True
        return self._found_changed

    @property
    def alive(self) -> bool:
        """Whether the engine may be written to: not gone, and its weights what was left there."""
        return not self.gone and not self.changed_by_others

    def remember(self) -> None:
        """The weights are now as this server leaves them."""
        if self.alive:
            self._left = sample(self.parameters())

    def require_as_left(self) -> None:
        """Compares some values of each parameter with those that `remember` saw.

        Raises FailedPrecondition with WEIGHTS_CHANGED where they are others.
        """
        if self._left is not None and not self.changed_by_others:
            self._found_changed = not torch.equal(self._left, sample(self.parameters()))
        self.require_live()

    def distrust(self, why: str) -> None:
        """From now on nothing is written, and nothing taken from the weights."""
        self.not_live = why
        self.lost.set()

    def require_live(self) -> None:
        """Raises FailedPrecondition where vLLM computes with other weights than were left."""
        if self.not_live:
            raise FailedPrecondition(self.not_live, reason="WEIGHTS_NOT_LIVE")
        if self.changed_by_others and not self.gone:
            raise FailedPrecondition(CHANGED_BY_OTHERS, reason="WEIGHTS_CHANGED")

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The live parameters by name, tied ones once."""
        return dict(self.model.named_parameters())

    def checkpoint(self) -> CheckpointReader:
        """The live weights by the names of the model directory."""
        return CheckpointReader(self.plan, self.parameters())

    def synchronize(self) -> None:
        """Waits until every write has arrived: before that vLLM must not go on."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def memory(self) -> MemoryUse:
        """Where the parameters lie, measured now."""
        return measure(list(self.parameters().values()), self.mappings.values())


@dataclass(frozen=True)
class Checks:
    """What an attachment is asked to prove beside the map.

    Attributes:
        values: that the weights of an engine that nobody trained are those of its directory.
        all_values: of every weight, not of blocks of each.
        liveness: that vLLM computes with what is written, by a probe that pauses it.
        lease_seconds: of that pause, as the setting of that name.
    """

    values: bool = True
    all_values: bool = False
    liveness: bool = True
    lease_seconds: float = 10.0


def attach(
    sidecar: Sidecar,
    epoch: str,
    *,
    checks: Checks = Checks(),
    traced: Callable[[MapReport], None] = lambda report: None,
) -> Attachment:
    """Maps and verifies the weights of the engine behind the sidecar.

    Args:
        epoch: of the engine process that was found.
        checks: which of them are made.
        traced: told what the trace found, before anything is refused for it.

    Raises FailedPrecondition when they may not be trained, Unavailable when the engine is gone.
    """
    began = time.monotonic()
    manifest = sidecar.manifest()
    regions = manifests.check_manifest(manifest, epoch)
    # Before the trace: whoever answers that was the same process all the while.
    producer = Producer(manifest.worker_pid, manifest.worker_pid_namespace)
    generation = SharedGeneration(manifest.generation_page)
    if not Path(manifest.model).is_dir():
        raise manifests.refusal(
            "MODEL_NOT_HERE",
            f"vLLM serves {manifest.model}, which is no folder of this machine. Start vLLM with "
            "the folder that holds the model.",
        )
    model = meta_model(manifest.model)
    plan = plan_checkpoint(model, held_names(Path(manifest.model)))
    answer = sidecar.trace(plan.request(manifest.epoch))
    derived = derived_parameters(plan, {each.name for each in answer.refused if each.computed})
    traced(MapReport(type(model).__name__, len(plan.roots), len(answer.views), derived))
    refused = {each.name: each.reason for each in answer.refused if each.name not in derived}
    _require_all_views(refused, len(plan.roots))
    plan = fix_parameters(model, plan, derived)
    views = manifests.check_views(list(answer.views), regions, plan.roots)
    # Only now: what is refused above was never mapped.
    mappings = map_buffers(manifest.buffers)
    tensors = {name: mappings[live.buffer_id].view(live) for name, live in views.items()}
    fill_with_views(model, plan, tensors)
    fill_fixed_values(model, plan, Path(manifest.model), derived)
    plan = reorder_outputs(model, plan, views)
    attachment = Attachment(
        manifest.epoch,
        manifest.model,
        manifest.max_model_len,
        manifest.weight_version,
        model,
        plan,
        mappings,
        producer,
        derived,
        generation=generation,
        found_generation=manifest.generation,
    )
    _require_no_copies(attachment)
    tokens = probe_tokens(model, attachment.max_model_len)
    # Before any value is read: while a dead server's probe is not put back, some are others.
    scores = _scores_when_resumed(sidecar, attachment.epoch, tokens)
    compared = 0
    # Once trained, the weights are ahead of the directory, and rightly so.
    if manifest.as_loaded and checks.values:
        directory, reader = Path(attachment.directory), attachment.checkpoint()
        compared = require_checkpoint_values(directory, reader, checks.all_values)
    _verify(attachment, tokens, scores)
    if checks.liveness:
        attachment.liveness = probe_liveness(
            sidecar,
            Probed(
                attachment.epoch,
                model,
                views,
                mappings,
                tokens,
                attachment.allowed,
                checks.lease_seconds,
            ),
        )
    attachment.remember()
    log.info(
        "attached to %s: %d parameters, %d values compared with the directory, "
        "log-probabilities within %.2g nats, %d kinds of tensor seen to be live in %.2f s, %.2f s",
        manifest.model,
        len(views),
        compared,
        attachment.logprob_difference,
        len(attachment.liveness.proven) if attachment.liveness else 0,
        attachment.liveness.seconds if attachment.liveness else 0.0,
        time.monotonic() - began,
    )
    return attachment


def _require_all_views(refused: dict[str, str], total: int) -> None:
    """The commonest reason stands for all: a user reads one cause, and mends one at a time."""
    if not refused:
        return
    causes = Counter(refused.values())
    ((cause, _),) = causes.most_common(1)
    others = f" (one of {len(causes)} reasons)" if len(causes) > 1 else ""
    raise manifests.refusal(
        "PARAMETER_REFUSED",
        f"{len(refused)} of {total} parameters are no views of vLLM's weights, because "
        f"{manifests.shortened(cause)}{others}: {manifests.named(refused)}.",
        refused,
    )


def _scores_when_resumed(sidecar: Sidecar, epoch: str, tokens: list[int]) -> list[float]:
    """vLLM's scores, after the pause of a training server that died has run out."""
    deadline = time.monotonic() + LONGEST_LEASE_SECONDS
    while True:
        try:
            return sidecar.score(epoch, tokens)
        except Unavailable as error:
            if error.reason != "PAUSED" or time.monotonic() > deadline:
                raise
        time.sleep(RESUMED_POLL_SECONDS)


def _require_no_copies(attachment: Attachment) -> None:
    """Its memory against the manifest."""
    memory = attachment.memory()
    if memory.copied_bytes:
        raise manifests.refusal(
            "WEIGHTS_COPIED",
            f"{memory.copied_bytes} bytes of parameters lie outside the shared memory.",
        )


def _verify(attachment: Attachment, tokens: list[int], engine: list[float]) -> None:
    """The training model against vLLM's scores of the same tokens."""
    ours = log_probabilities(attachment.model, tokens)
    noise, dtype = noise_of(attachment.model, tokens, ours), weights_dtype(attachment.model)
    attachment.logprob_difference = require_agreement(ours, engine, dtype, noise)
    if dtype.itemsize < torch.float32.itemsize:
        attachment.allowed = allowed(noise(), dtype)

"""Attach: manifest, map, views, model, verify. All of it, or nothing is trained."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apollo_grpc.errors import Unavailable
from apollo_grpc.generation import SharedGeneration
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.parallel.ranks import ALONE, Ranks
from apollo_trainer.weights import manifest as manifests
from apollo_trainer.weights.attachment import Attachment
from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.directory_names import held_names
from apollo_trainer.weights.divided_model import divide_model
from apollo_trainer.weights.fixed_values import (
    derived_parameters,
    fill_fixed_values,
    fix_parameters,
)
from apollo_trainer.weights.live_model import fill_with_views, meta_model
from apollo_trainer.weights.live_view import (
    LiveView,
    check_views,
    require_all_views,
    views_of_others,
)
from apollo_trainer.weights.liveness import (
    LONGEST_LEASE_SECONDS,
    Probed,
    follow_probe,
    probe_liveness,
)
from apollo_trainer.weights.mapping import map_buffers
from apollo_trainer.weights.producer import Producer
from apollo_trainer.weights.row_order import reorder_outputs
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.values import require_checkpoint_values
from apollo_trainer.weights.verify import (
    allowed,
    log_probabilities,
    noise_of,
    probe_tokens,
    require_agreement,
    weights_dtype,
)

log = logging.getLogger(__name__)
RESUMED_POLL_SECONDS = 0.1


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
    ranks: Ranks = ALONE,
    traced: Callable[[MapReport], None] = lambda report: None,
    prepare: Callable[[Any], str] = lambda model: "",
) -> Attachment:
    """Maps and verifies the weights of the engine behind the sidecar.

    Args:
        epoch: of the engine process that was found.
        checks: which of them are made.
        ranks: that attach together, one to each of vLLM's workers.
        traced: told what the trace found, before anything is refused for it.
        prepare: given the model before anything is computed with it; what it says is kept.

    Raises FailedPrecondition when they may not be trained, Unavailable when the engine is gone.
    """
    began = time.monotonic()
    manifest = sidecar.manifest(ranks.rank)
    attachment, views = _mapped(sidecar, manifest, epoch, ranks, traced)
    log.info(
        "%d parameters are mapped, after %.1f s", len(attachment.regions), time.monotonic() - began
    )
    attachment.computed_by = prepare(attachment.model)
    tokens = probe_tokens(attachment.model, attachment.max_model_len)
    # Before any value is read: while a dead server's probe is not put back, some are others.
    scores = ranks.first(_scores_when_resumed(sidecar, attachment.epoch, tokens))
    compared = 0
    # Once trained, the weights are ahead of the directory, and rightly so.
    if manifest.as_loaded and checks.values:
        directory, reader = Path(attachment.directory), attachment.checkpoint()
        compared = require_checkpoint_values(directory, reader, checks.all_values)
        log.info("%d values are the directory's, after %.1f s", compared, time.monotonic() - began)
    _verify(attachment, tokens, scores)
    log.info("both score alike, after %.1f s", time.monotonic() - began)
    if checks.liveness:
        probed = Probed(
            attachment.epoch,
            attachment.model,
            views,
            attachment.mappings,
            tokens,
            attachment.allowed,
            checks.lease_seconds,
            ranks,
        )
        if ranks.rank == 0:
            attachment.liveness = probe_liveness(sidecar, probed)
        else:
            follow_probe(probed)
    attachment.remember()
    log.info(
        "attached to %s: %d parameters, %d values compared with the directory, "
        "log-probabilities within %.2g nats, %d kinds of tensor seen to be live in %.2f s, %.2f s",
        manifest.model,
        len(attachment.regions),
        compared,
        attachment.logprob_difference,
        len(attachment.liveness.proven) if attachment.liveness else 0,
        attachment.liveness.seconds if attachment.liveness else 0.0,
        time.monotonic() - began,
    )
    return attachment


def _mapped(
    sidecar: Sidecar,
    manifest: pb.WeightManifest,
    epoch: str,
    ranks: Ranks,
    traced: Callable[[MapReport], None],
) -> tuple[Attachment, list[LiveView]]:
    """The weights as a model's parameters, none of their values read; and vLLM's views of all,
    this rank's first."""
    spans = manifests.check_manifest(manifest, epoch, ranks)
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
    found = {view.name for view in answer.views}
    traced(MapReport(type(model).__name__, len(plan.roots), len(found), derived))
    refused = {each.name: each.reason for each in answer.refused if each.name not in derived}
    require_all_views(refused, len(plan.roots))
    plan = fix_parameters(model, plan, derived)
    views = check_views(list(answer.views), spans, plan.roots, ranks.rank, ranks.size)
    # Only now: what is refused above was never mapped.
    mappings = map_buffers(manifest.buffers)
    tensors = {name: mappings[live.buffer_id].view(live) for name, live in views.items()}
    fill_with_views(model, plan, tensors)
    fill_fixed_values(model, plan, Path(manifest.model), derived)
    regions = {name: view.region for name, view in views.items()}
    reorder_outputs(model, plan, regions)
    divide_model(model, regions, ranks)
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
        regions=regions,
        ranks=ranks,
        generation=generation,
        found_generation=manifest.generation,
        vllm_version=manifest.vllm_version,
    )
    _require_no_copies(attachment)
    others = views_of_others(list(answer.views), plan.roots, ranks.rank, ranks.size)
    return attachment, [*views.values(), *others]


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

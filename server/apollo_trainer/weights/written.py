"""After a run that wrote: do both sides still compute with one model?

An engine that made copies of its weights after it was attached passed every check until then. What
it serves is then the model of before the run, and what was trained is served by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from apollo_grpc.errors import Unavailable
from apollo_trainer.weights.attachment import Attachment
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.verify import (
    allowed,
    log_probabilities,
    noise_of,
    probe_tokens,
    quantiles,
    weights_dtype,
)

# Of the run's own tokens; those of every attachment follow.
RUN_TOKENS = 64
# Beside a busy engine's other requests.
SCORE_SECONDS = 30.0


def require_written_is_live(
    sidecar: Sidecar, attachment: Attachment, trained: Sequence[int]
) -> None:
    """Has both sides score the same tokens once, vLLM resumed and its caches reset.

    Args:
        trained: tokens that the run learned.

    Raises FailedPrecondition with WEIGHTS_NOT_LIVE, the attachment then being of no more use;
    Unavailable where it cannot be told.
    """
    model, length = attachment.model, attachment.max_model_len
    tokens = [*trained[:RUN_TOKENS], *probe_tokens(model, length)][: max(2, length - 1)]
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(sidecar.score, attachment.epoch, tokens, SCORE_SECONDS)
        attachment.ranks.tell("score", tokens=tokens)
        ours = log_probabilities(model, tokens)
        engine = torch.tensor(asked.result())
    compared = ours.isfinite()
    if len(engine) != len(ours) or not compared.any():
        raise Unavailable("There are no scores of both sides that could be compared.")
    apart, dtype = (ours - engine).abs()[compared], weights_dtype(model)
    found = quantiles(apart, dtype)
    # To measure rounding anew takes longer than all else: only where what was trained may explain
    # a difference that was not there before.
    if (found <= attachment.allowed).all():
        return
    attachment.ranks.tell("noise", tokens=tokens)
    noisier = allowed(noise_of(model, tokens, ours)()[compared], dtype)
    if (found <= noisier).all():
        attachment.allowed = torch.maximum(attachment.allowed, noisier)
        return
    if attachment.changed_by_others:
        raise Unavailable("Somebody else changed vLLM's weights meanwhile.")
    attachment.distrust(
        "vLLM does not compute with what the last run wrote: both sides are "
        f"{float(apart.median()):.3g} nats apart at the median, {float(apart.max()):.3g} at most. "
        "It has made a copy of weights since it was attached. Nothing more is written to it, and "
        "nothing is synced, exported or kept: what was trained is not what it serves. The model "
        "directory and the Apollo state on disk are as they were before the run. Restart vLLM; "
        "'apollo doctor' says whether its weights stay live."
    )
    attachment.require_live()

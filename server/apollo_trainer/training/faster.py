"""Fewer and faster kernels for a model on a GPU, where it computes what they do."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from apollo_trainer.training.attention import use_grouped_attention
from apollo_trainer.training.batch import Mixing
from apollo_trainer.training.capture import Capture
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.norms import fuse_norms

log = logging.getLogger(__name__)


def speed_up(model: Any) -> None:
    """Replaces parts of a model by faster ones.

    Kernels are compiled here, not in a run; that takes seconds unless an earlier process did it.
    """
    norms, grouped, gated = fuse_norms(model), use_grouped_attention(model), 0
    rotary = convolutions = False
    with suppress(ImportError):
        from apollo_trainer.training.kernels.causal_conv import fuse_conv
        from apollo_trainer.training.kernels.gated import fuse_gated
        from apollo_trainer.training.kernels.rotary import fuse_rotary

        gated, rotary = fuse_gated(model), fuse_rotary(model) > 0
        convolutions = fuse_conv(model) > 0
    if model.device.type == "cuda":
        Capture(model).compile("any" if mixing_of(model) is Mixing.PADDED else "none")
    log.info(
        "kernels: %d RMS norms, %d gated MLPs, rotary %s, convolutions %s, grouped attention %s",
        norms, gated, rotary, convolutions, grouped,
    )  # fmt: skip

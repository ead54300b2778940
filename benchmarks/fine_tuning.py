"""Going on from one trained bfloat16 checkpoint at a rate where rounding decides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from byte_lm import ByteLM
from torch import Tensor
from training import FINE_TUNE, VARIANTS, Plan, learn, placed, texts, train


def fine_tune(
    plan: Plan,
    steps: int,
    lr: float,
    checkpoint_lr: float,
    seeds: Sequence[int],
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Trains a checkpoint on the library, then each variant from it on other text, at `lr`.

    The seeds decide the order of the text and the draws; the checkpoint is the same for all.
    """
    known = {variant.name: variant for variant in VARIANTS}
    checkpoint, record = train(known["Apollo bf16 split16"], plan, checkpoint_lr, seed=0)
    tell(record)
    text = texts(plan.device, plan.text_bytes)[1]
    runs = []
    for seed in seeds:
        exact: Tensor | None = None
        for name in FINE_TUNE:
            model = placed(copy.deepcopy(checkpoint), known[name], plan)
            rates = [lr] * steps
            short = replace(plan, steps=steps)
            run = learn(model, known[name], text, short, rates, seed)
            moved = _movement(checkpoint, model)
            exact = moved if exact is None else exact
            runs.append({"variant": name, "lr": lr, "seed": seed, **run, **_compare(moved, exact)})
            tell(runs[-1])
    return {
        "lr": lr,
        "steps": steps,
        "text": text.describe(),
        "checkpoint": record,
        "runs": runs,
    }


def _movement(before: ByteLM, after: ByteLM) -> Tensor:
    """What training changed in the weights, as one float32 vector."""
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    return torch.cat([(a.detach().float() - b.detach().float()).flatten() for a, b in pairs])


def _compare(moved: Tensor, exact: Tensor) -> dict[str, float]:
    """How far the weights went along the float32 run's way, and how many changed at all."""
    along = torch.dot(moved, exact) / torch.dot(exact, exact)
    return {
        "part_of_fp32_movement": round(float(along), 4),
        "length_over_fp32": round(float(moved.norm() / exact.norm()), 4),
        "changed_weights": round(float((moved != 0).float().mean()), 4),
    }

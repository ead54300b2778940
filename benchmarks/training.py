"""One training run of the byte model: a variant of optimizer and precision, a rate and a seed."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from byte_lm import ByteLM, Text, library_text, new_model, other_text
from torch import Tensor
from torch.optim import Optimizer

from apollo_trainer.optim import Apollo

Curve = list[tuple[int, float | None]]


@dataclass(frozen=True)
class Variant:
    """An optimizer and the precision that the weights, gradients and the forward pass are in."""

    name: str
    optimizer: Literal["adamw", "apollo"]
    dtype: Literal["float32", "bfloat16"]
    rounding: Literal["stochastic", "nearest", "split16"] = "stochastic"
    rank: int | None = 64
    kind: Literal["channel", "mini"] = "channel"
    compat: Literal["apollo-torch"] | None = None
    elementwise: str = ""  # regular expression: parameters that AdamW serves


VARIANTS = (
    Variant("AdamW fp32", "adamw", "float32"),
    Variant("AdamW bf16", "adamw", "bfloat16"),
    Variant("Apollo fp32", "apollo", "float32"),
    Variant("Apollo bf16 stochastic", "apollo", "bfloat16"),
    Variant("Apollo bf16 nearest", "apollo", "bfloat16", "nearest"),
    Variant("Apollo bf16 split16", "apollo", "bfloat16", "split16"),
    Variant("Apollo mini bf16 stochastic", "apollo", "bfloat16", rank=1, kind="mini"),
)
OPTIONAL = (
    Variant("Apollo rank 16 bf16 stochastic", "apollo", "bfloat16", rank=16),
    Variant("Apollo rank 128 fp32", "apollo", "float32", rank=128),
    # As the paper trains: only the blocks' matrices are projected.
    Variant("Apollo fp32, ends by AdamW", "apollo", "float32", elementwise="embed|position|head"),
    # Tells whether a difference is the algorithm's or this implementation's.
    Variant("apollo-torch's arithmetic fp32", "apollo", "float32", compat="apollo-torch"),
    # The rank None of Apollo is AdamW: here with a float32 master in two halves.
    Variant("AdamW bf16 with fp32 master", "apollo", "bfloat16", "split16", rank=None),
)
FINE_TUNE = ("Apollo fp32", "Apollo bf16 stochastic", "Apollo bf16 nearest", "Apollo bf16 split16")


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    device: str
    steps: int
    batch: int
    context: int
    width: int
    layers: int
    text_bytes: int
    validation_windows: int
    evaluations: int
    warmup_steps: int
    last_rate: float
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    impl: Literal["auto", "reference", "fused"]


def train(variant: Variant, plan: Plan, lr: float, seed: int) -> tuple[ByteLM, dict[str, Any]]:
    """Trains a new model on the library's sources; returns it and the run's record."""
    model = placed(new_model(plan.width, plan.layers, plan.context, seed), variant, plan)
    text = texts(plan.device, plan.text_bytes)[0]
    rates = [lr * factor(step, plan) for step in range(plan.steps)]
    record = learn(model, variant, text, plan, rates, seed)
    return model, {"variant": variant.name, "lr": lr, "seed": seed, **record}


def placed(model: ByteLM, variant: Variant, plan: Plan) -> ByteLM:
    """The model on the plan's device in the variant's precision."""
    return model.to(device=plan.device, dtype=getattr(torch, variant.dtype))


def factor(step: int, plan: Plan) -> float:
    """Warm-up from near 0 to 1, then half a cosine down to `last_rate`."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - 1 - plan.warmup_steps)
    return plan.last_rate + (1 - plan.last_rate) * 0.5 * (1 + math.cos(math.pi * done))


def learn(
    model: ByteLM, variant: Variant, text: Text, plan: Plan, rates: Sequence[float], seed: int
) -> dict[str, Any]:
    """Trains with one step for each rate; returns the curve of the loss on held-out text."""
    optimizer = make_optimizer(model, variant, plan, seed)
    starts = _starts(text.train, len(rates), plan, seed)
    every = max(1, len(rates) // plan.evaluations)
    losses = [(0, evaluate(model, text.validation, plan))]
    begun = time.perf_counter()
    for step, lr in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.loss(_windows(text.train, starts[step], plan)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == len(rates):
            losses.append((step + 1, evaluate(model, text.validation, plan)))
    # Read only here: reading a loss waits for the device.
    curve = [(step, _finite(float(loss))) for step, loss in losses]
    seconds = time.perf_counter() - begun
    record = {"final": curve[-1][1], "curve": curve, "seconds": round(seconds, 3)}
    if isinstance(optimizer, Apollo):
        record["skipped_nonfinite"] = optimizer.skipped_nonfinite
    return record


def make_optimizer(model: ByteLM, variant: Variant, plan: Plan, seed: int) -> Optimizer:
    """The variant's optimizer; betas, eps and decay are the same for all."""
    common: dict[str, Any] = {"betas": plan.betas, "eps": 1e-8, "weight_decay": plan.weight_decay}
    if variant.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=plan.device != "cpu", **common)
    if variant.compat:
        common["eps"] = 1e-6  # its default
    named = list(model.named_parameters())
    apart = [n for n, _ in named if variant.elementwise and re.search(variant.elementwise, n)]
    groups: list[dict[str, Any]] = [{"params": [(n, p) for n, p in named if n not in apart]}]
    if apart:
        groups.append({"params": [(n, p) for n, p in named if n in apart], "rank": None})
    return Apollo(
        groups,
        rank=variant.rank,
        variant=variant.kind,
        rounding=variant.rounding,
        seed=seed,
        impl="reference" if variant.compat else plan.impl,
        compat=variant.compat,
        **common,
    )


@torch.no_grad()
def evaluate(model: ByteLM, text: Tensor, plan: Plan) -> Tensor:
    """Mean loss over evenly spaced windows, the same for all runs; stays on the device."""
    last = text.numel() - plan.context - 1
    starts = torch.linspace(0, last, plan.validation_windows, device=text.device).long()
    parts = starts.split(max(plan.batch, 64))
    total = sum(model.loss(_windows(text, part, plan)) * len(part) for part in parts)
    return torch.as_tensor(total) / len(starts)


def _starts(text: Tensor, steps: int, plan: Plan, seed: int) -> Tensor:
    """Where the windows of each step begin [steps, batch]: a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    last = text.numel() - plan.context - 1
    return torch.randint(0, last, (steps, plan.batch), generator=generator).to(text.device)


def _windows(text: Tensor, starts: Tensor, plan: Plan) -> Tensor:
    """The windows [batch, context + 1] that begin there, int64."""
    offsets = torch.arange(plan.context + 1, device=text.device)
    return text[starts.unsqueeze(-1) + offsets].long()


@lru_cache(maxsize=2)
def texts(device: str, cap: int) -> tuple[Text, Text]:
    """The library's sources and the other text, on the device."""
    found = library_text(cap), other_text(cap)
    library, other = (
        Text(t.train.to(device), t.validation.to(device), t.source, t.digest) for t in found
    )
    return library, other


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None

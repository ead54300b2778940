"""AdamW on tensors that are not projected."""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from apollo_trainer.optim.cuda.columns import (
    BETA1,
    BETA2,
    COLS,
    CUT_NONE,
    DECAY,
    EPS,
    FIELDS,
    G_PTR,
    GROUP,
    LOW_PTR,
    LR,
    M_PTR,
    ROUND_KEY,
    SETTINGS,
    SLOT,
    STEP_PTR,
    V_PTR,
    W_PTR,
)
from apollo_trainer.optim.cuda.draw import bits16, in_whole, power
from apollo_trainer.optim.cuda.round import join_halves, round_up, split_halves, within_range


@triton.jit
def adam_check(desc, tiles, flags, G_TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Flags the tensors whose gradient is not finite; elements lie one after another."""
    tensor = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    d = desc + tensor * FIELDS
    i = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    G = tl.load(d + G_PTR).to(tl.pointer_type(G_TYPE))
    g = tl.load(G + i, mask=i < tl.load(d + COLS), other=0.0).to(tl.float32)
    bad = ~(tl.sum(g * g, 0) < float("inf"))
    tl.atomic_max(flags + 2 * tensor, bad.to(tl.int32))


@triton.jit
def adam_write(desc, tiles, settings, flags, number, changes, W_TYPE: tl.constexpr,
               G_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, SPLIT: tl.constexpr,
               MEASURE: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """AdamW on tensors that are not projected; `adam_count` counts their step."""
    tensor = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    d = desc + tensor * FIELDS
    settings += tl.load(d + GROUP) * SETTINGS
    i = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # A tensor that is not stepped has no elements to write.
    mask = i < tl.where(tl.load(flags + 2 * tensor) == 0, tl.load(d + COLS), 0)
    W = tl.load(d + W_PTR).to(tl.pointer_type(W_TYPE)) + i
    G = tl.load(d + G_PTR).to(tl.pointer_type(G_TYPE)) + i
    m = tl.load(d + M_PTR).to(tl.pointer_type(tl.float32)) + i
    v = tl.load(d + V_PTR).to(tl.pointer_type(tl.float32)) + i
    t = tl.load(tl.load(d + STEP_PTR).to(tl.pointer_type(tl.int64))) + 1
    beta1, beta2 = tl.load(settings + BETA1), tl.load(settings + BETA2)
    correction1 = (1.0 - power(beta1, t)).to(tl.float32)
    correction2 = (1.0 - power(beta2, t)).to(tl.float32)
    stored = tl.load(W, mask=mask, other=0.0)
    g = tl.load(G, mask=mask, other=0.0).to(tl.float32)
    new_m = tl.load(m, mask=mask, other=0.0) * beta1.to(tl.float32) + g * (1.0 - beta1).to(
        tl.float32
    )
    new_v = tl.load(v, mask=mask, other=0.0) * beta2.to(tl.float32) + g * g * (1.0 - beta2).to(
        tl.float32
    )
    tl.store(m, new_m, mask=mask)
    tl.store(v, new_v, mask=mask)
    eps = tl.load(settings + EPS).to(tl.float32)
    update = (new_m / correction1) / (tl.sqrt(new_v / correction2) + eps)
    update = update * tl.load(settings + LR).to(tl.float32)
    old = stored.to(tl.float32)
    if SPLIT:
        low_at = tl.load(d + LOW_PTR).to(tl.pointer_type(tl.int16)) + i
        old = join_halves(stored, tl.load(low_at, mask=mask, other=0).to(tl.int32))
    new = old * tl.load(settings + DECAY).to(tl.float32) - update
    if tl.float32 == W_TYPE:
        rounded = new
    elif SPLIT:
        upper, low = split_halves(new)
        rounded = upper.to(W_TYPE)
        tl.store(low_at, low, mask=mask)
    elif STOCHASTIC:
        element = i
        if CUT != CUT_NONE:
            element = in_whole(i, d)
        bits = bits16(element, tl.load(number), tl.load(d + ROUND_KEY), tl.load(d + ROUND_KEY + 1))
        rounded = round_up(within_range(new), bits, W_TYPE)
    else:
        rounded = within_range(new).to(W_TYPE)
    tl.store(W, rounded, mask=mask)
    if MEASURE:
        difference = tl.where(mask, rounded.to(tl.float32) - stored.to(tl.float32), 0.0)
        out = changes + 2 * tl.program_id(0).to(tl.int64)
        tl.store(out, tl.sum((difference * difference).to(tl.float64), 0))
        tl.store(out + 1, tl.sum((difference != 0).to(tl.float64), 0))


@triton.jit
def adam_count(desc, flags, slot_flags):
    """A program a tensor: its step count, and whether it was skipped."""
    tensor = tl.program_id(0).to(tl.int64)
    d = desc + tensor * FIELDS
    bad = tl.load(flags + 2 * tensor) != 0
    step_at = tl.load(d + STEP_PTR).to(tl.pointer_type(tl.int64))
    tl.store(step_at, tl.load(step_at) + (~bad).to(tl.int64))
    tl.atomic_max(slot_flags + tl.load(d + SLOT), bad.to(tl.int32))

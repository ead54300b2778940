"""Attention to a context kept apart, by plain products and a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apollo_trainer.training.apart import Frozen, Rule


def attended(
    q: Tensor, k: Tensor, v: Tensor, frozen: Frozen | None, rule: Rule, sinks: Tensor | None
) -> Tensor:
    """What `kernels.attention.attend` says: in float64, sample by sample."""
    out, (samples, heads, width, _) = [], q.shape
    for n in range(samples):
        keys, values, length = k[n].double(), v[n].double(), 0
        if frozen is not None:
            length, row = int(frozen.lengths[n]), int(frozen.rows[n])
            keys = torch.cat([frozen.keys[row, :, :length].double(), keys], 1)
            values = torch.cat([frozen.values[row, :, :length].double(), values], 1)
        group = heads // k.shape[1]
        keys, values = (t.repeat_interleave(group, 0) for t in (keys, values))
        scores = q[n].double() @ keys.mT * rule.scale
        if rule.cap:
            scores = rule.cap * torch.tanh(scores / rule.cap)
        place = torch.arange(length + width, device=q.device)
        distance = place[length:, None] - place
        seen = (distance >= 0) & (distance < (rule.window or math.inf))
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            of_sinks = sinks.double()[:, None, None].expand(-1, width, 1)
            scores = torch.cat([scores, of_sinks], 2)
        p = scores.softmax(2)[..., : length + width]
        out.append((p @ values).transpose(0, 1))
    return torch.stack(out).to(q.dtype)

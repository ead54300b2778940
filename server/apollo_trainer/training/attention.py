"""Attention of few queries to many keys, as a continuation over a frozen context has it.

torch's fast kernels take grouped queries only where there is no mask, so that transformers copies
keys and values, once for each query head of a group. Here the query heads of a group are rows of
one head instead. And where the mask says no more than that keys begin at a place and that queries
are the last of them, FlashAttention's kernel is told so, and no mask is read at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_group"
_SPAN, _CAUSAL = "apollo_span", "apollo_causal"
_LARGEST_HEAD = 256


def use_grouped_attention(model: Any) -> bool:
    """Has a model that attends by torch's kernels do so; returns whether it does."""
    if getattr(model.config, "_attn_implementation", "") != "sdpa":
        return False
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Query [B, H, T, D], key and value [B, H / group, S, D], mask [B, 1, T, S]: [B, T, H, D]."""
    if getattr(attention_mask, _CAUSAL, False):
        attention_mask = None
    span = getattr(attention_mask, _SPAN, None)
    if span is not None and _is_fast(query, key, value):
        return _over_span(query, key, value, span, scaling), None
    (rows, heads, width, _), key_heads = query.shape, key.shape[1]
    mask, group = attention_mask, heads // key_heads
    plain = mask is None or mask.shape[1:3] != (1, width) or group == 1
    if mask is None or plain or others.get("position_bias") is not None or others.get("dropout"):
        answer: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return answer
    attended = F.scaled_dot_product_attention(
        query.reshape(rows, key_heads, group * width, -1),
        key,
        value,
        attn_mask=mask.repeat(1, 1, group, 1),
        scale=scaling,
    )
    return attended.view(rows, heads, width, -1).transpose(1, 2).contiguous(), None


def causal_mask(width: int, device: torch.device) -> Tensor:
    """A mask [1, 1, T, T] that says no more than that tokens follow each other.

    transformers makes one by itself, without this mark, where a graph is captured.
    """
    mask = torch.ones(1, 1, width, width, dtype=torch.bool, device=device).tril()
    setattr(mask, _CAUSAL, True)
    return mask


def mark_span(mask: Tensor, first: Tensor) -> None:
    """Says what a mask [1, 1, T, S] says: keys from `first` on, 0-dim, and queries are the last."""
    queries, keys = mask.shape[2:]
    ends = torch.arange(2, dtype=torch.int32, device=mask.device)
    # The first of two is 0 and the second 1.
    of_keys = torch.where(ends == 0, first.to(torch.int32), keys).to(torch.int32)
    setattr(mask, _SPAN, (ends * queries, of_keys))


def _is_fast(query: Tensor, key: Tensor, value: Tensor) -> bool:
    sizes = {t.shape[-1] for t in (query, key, value)}
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and len(sizes) == 1 and max(sizes) <= _LARGEST_HEAD


def _over_span(
    query: Tensor, key: Tensor, value: Tensor, span: tuple[Tensor, Tensor], scaling: float | None
) -> Tensor:
    # [places, heads, size]: rows of several samples would lie one after another.
    parts = (t[0].transpose(0, 1) for t in (query, key, value))
    attended: Tensor = _Span.apply(*parts, *span, scaling)  # type: ignore[no-untyped-call]
    return attended.unsqueeze(0)


class _Span(torch.autograd.Function):
    """FlashAttention of one sequence, its last key the last query's own."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor,
        scale: float | None,
    ) -> Tensor:  # fmt: skip
        """[T, H, D], [S, H / group, D] twice: [T, H, D]."""
        out, sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, of_queries, of_keys, len(q), len(k), 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, sums, of_queries, of_keys, seed, offset)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of keys that are not seen are not written, and read by nobody."""
        q, k, v, out, sums, of_queries, of_keys, seed, offset = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(), q, k, v, out, sums, of_queries, of_keys, len(q), len(k), 0.0,
            True, seed, offset, scale=ctx.scale,
        )  # fmt: skip
        return (*found, None, None, None)

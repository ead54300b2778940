"""Attention of few queries to many keys, as a continuation over a frozen context has it.

torch's fast kernels take grouped queries only where there is no mask, so that transformers copies
keys and values, once for each query head of a group. Here the query heads of a group are rows of
one head instead. Where contexts are kept apart, a kernel attends to them and to the continuation,
and no mask is made. Capped scores and sinks, of which torch's kernels know nothing, are plain
products elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from apollo_trainer.parallel.vocabulary import vocabulary_size
from apollo_trainer.training.apart import (
    Contexts,
    NotApart,
    Rule,
    current,
    window_mask,
    window_of,
)

try:
    from apollo_trainer.training.kernels.attention import attend
except ImportError:  # no Triton
    attend = None  # type: ignore[assignment]

# Without "sdpa" in it: transformers would ask a model whether it supports that.
NAME = "attention_by_group"
_QUERIES_AT_ONCE = 256  # of a head, whose float32 scores are held together
_OWN = "eager_attention_forward"
_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
# Not minus infinity: a query that sees nothing, as padding's, would be no number.
_LEAST = torch.finfo(torch.float32).min


def use_grouped_attention(model: Any) -> bool:
    """Has a model attend by groups; returns whether it does.

    One that attends by its own code is asked first: each of its layers must say the same.
    """
    before = getattr(model.config, "_attn_implementation", "")
    if before not in ("sdpa", "eager"):
        return False
    AttentionMaskInterface.register(NAME, grouped_mask)
    AttentionInterface.register(NAME, grouped_attention)
    model.set_attn_implementation(NAME)
    grouped = bool(model.config._attn_implementation == NAME)
    if grouped and before == "eager" and not _agrees(model):
        model.set_attn_implementation(before)
        return False
    return grouped


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Whether each layer's own code and `grouped_attention` say the same of a few tokens."""
    said: list[bool] = []

    def both(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **others: Any,
    ) -> tuple[Tensor, None]:
        given = (module, query, key, value, attention_mask)
        said.append(_is_own(*given, **others))
        return grouped_attention(*given, **others)

    AttentionInterface.register(NAME, both)
    vocabulary = vocabulary_size(model)
    ids = torch.arange(1, 9, device=model.device)[None] % vocabulary
    try:
        model(ids, use_cache=False)
    except _ERRORS:
        return False
    finally:
        AttentionInterface.register(NAME, grouped_attention)
    return bool(said) and all(said)


def _is_own(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any
) -> bool:
    own = getattr(sys.modules[type(module).__module__], _OWN)
    seen = _triangle(query, key) if mask is None else mask
    added = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, _LEAST)
    # Loud ones too: a cap bends large scores alone.
    for loudness in (1.0, 8.0):
        wide = (query.float() * loudness, key.float(), value.float())
        expected = own(module, *wide, added, **others)[0]
        got = grouped_attention(module, *wide, seen, **others)[0]
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            return False
    return True


def grouped_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Tensor | None:
    """transformers' mask, bool [B, 1, T, S]; none where tokens only follow each other.

    Where contexts are kept apart, what stands for a mask. Raises NotApart where nothing can.

    Args:
        attention_mask: [B, S], 0 at padding.
        local_size: places of a window, or of a chunk.
        allow_is_causal_skip: the model has changed nothing in the mask.
    """
    padding, causal = attention_mask, allow_is_causal_skip
    all_before = local_size is None or kv_length < local_size
    if causal and padding is None and all_before and kv_length == q_length:
        # transformers makes one all the same where a graph is captured.
        return None
    contexts = current()
    if contexts is not None:
        window = 0 if local_size is None else local_size
        sliding = getattr(others.get("config"), "sliding_window", None)
        if padding is not None or not causal or window not in (0, sliding):
            raise NotApart("a mask says more than a window")
        return window_mask(window, others.get("device"))
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=padding,
        local_size=local_size, allow_is_causal_skip=causal, **others,
    )  # fmt: skip


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Query [B, H, T, D], key and value [B, H / group, S, D], mask [B, 1, T, S]: [B, T, H, D].

    Args:
        softcap: scores are bent to stay below it.
        s_aux: [H], the score of nothing, which takes its share and gives no value.
    """
    contexts = current()
    if contexts is not None:
        apart = _apart(
            contexts, module, (query, key, value), attention_mask, scaling, softcap, s_aux, others
        )
        if apart is not None:
            return apart, None
    if softcap is not None or s_aux is not None:
        seen = _triangle(query, key) if attention_mask is None else attention_mask
        return _by_product(query, key, value, seen, scaling, softcap, s_aux), None
    (rows, heads, width, _), (key_heads, keys) = query.shape, key.shape[1:3]
    mask, group = attention_mask, heads // key_heads
    plain = mask is None or mask.shape[1:3] != (1, width) or group == 1 or width == keys
    adds = others.get("position_bias") is not None or others.get("dropout")
    with _compiling_nothing(mask):
        if mask is None or plain or adds:
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
    return attended.reshape(rows, heads, width, -1).transpose(1, 2).contiguous(), None


@contextmanager
def _compiling_nothing(mask: Tensor | None) -> Iterator[None]:
    """Leaves out cuDNN's attention, which compiles for 3 s where a mask has a new shape (H200)."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(allowed and mask is None)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def _apart(
    contexts: Contexts,
    module: Any,
    parts: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    others: dict[str, Any],
) -> Tensor | None:
    """Attention to contexts that are kept apart; None where torch's own kernel is the faster."""
    query, key, value = parts
    frozen, window = contexts.of(module.layer_idx, key), window_of(mask)
    if frozen is None and not window and softcap is None and sinks is None:
        return None
    if others.get("position_bias") is not None or others.get("dropout"):
        raise NotApart("scores have something added")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, frozen, Rule(scale, window, softcap or 0.0), sinks)


def _by_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same, by scores in float32 of some queries at a time."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    (rows, heads, _, size), key_heads = query.shape, key.shape[1]
    attended = []
    parts = (torch.split(each, _QUERIES_AT_ONCE, 2) for each in (query, seen))
    for part, visible in zip(*parts, strict=True):
        # [B, H / group, group, T, S] of what the query heads of a group share.
        folded = part.reshape(rows, key_heads, -1, size) @ key.mT
        scores = folded.float().mul(scale).view(rows, key_heads, -1, part.shape[2], key.shape[2])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible.unsqueeze(2), _LEAST)
        shares = _shares(scores, sinks).to(value.dtype).flatten(2, 3)
        attended.append((shares @ value).view(rows, heads, part.shape[2], -1))
    return torch.cat(attended, 2).transpose(1, 2).contiguous()


def _shares(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """What each query takes of each key: [B, H / group, group, T, S]."""
    if sinks is None:
        return scores.softmax(-1)
    rows, key_heads, _, width, _ = scores.shape
    nothing = sinks.float().view(1, key_heads, -1, 1, 1).expand(rows, -1, -1, width, 1)
    return torch.cat([scores, nothing], -1).softmax(-1)[..., :-1]


def _triangle(query: Tensor, key: Tensor) -> Tensor:
    """Of queries that are the last keys, what each sees: bool [1, 1, T, S]."""
    width, keys = query.shape[2], key.shape[2]
    seen = torch.ones(1, 1, width, keys, dtype=torch.bool, device=query.device)
    return seen.tril(keys - width)

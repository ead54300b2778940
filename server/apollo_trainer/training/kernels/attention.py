"""Attention of a continuation to a frozen context and to itself, as two kernels each way.

The queries are few and the keys many. FlashAttention's kernels then leave most of a GPU idle, make
gradients of the context's keys that nobody asks for, and want both parts' keys copied next to each
other. Here the heads of a group are rows of one tile, the context is cut into parts that run side
by side, and each part of the keys stays where it is. Softmax by parts: Dao et al., arXiv
2205.14135, equation 4 of arXiv 2307.08691.
"""

# Triton reads the source of its functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_trainer.training.apart import Frozen, NotApart, Rule

_LARGEST_HEAD = 256
_LOG2_E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-1e30)  # a largest score where no key was seen
_SHORTEST_PART = 256  # keys
_PROGRAMS = 96  # from so many on, cutting contexts costs an H200 more than it gives


def attend(
    query: Tensor, key: Tensor, value: Tensor, frozen: Frozen | None, rule: Rule,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each query attends to its context, and to the keys up to its own.

    Args:
        query: [samples, heads, T, size].
        key: [samples, key heads, T, size], as `value`; heads of queries share them by groups.
        frozen: before the first key; None where nothing is.
        sinks: [heads], scores of a key without a value; None where there is none.

    Returns [samples, T, heads, size]. Raises NotApart where the heads are of no size that the
    kernels take.
    """
    sizes = {t.shape[-1] for t in (query, key, value)}
    if len(sizes) > 1 or max(sizes) > _LARGEST_HEAD:
        raise NotApart("heads are too large, or of two sizes")
    parts = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)]
    result: Tensor = _Attention.apply(*parts, sinks, frozen, rule)
    return result


@triton.jit
def _rows(block, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of a tile: token by token, and of each the heads of a group."""
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return r, r // GROUP, r % GROUP


@triton.jit
def _seen(scores, t, j, inside, shift, window, cap, CAPPED: tl.constexpr, WINDOWED: tl.constexpr):
    """Scores in powers of two, and minus infinity where a key is not seen."""
    if CAPPED:
        # tanh by the exponential, which Triton has on every device.
        scores = cap * (1.0 - 2.0 / (tl.exp2(2.0 * _LOG2_E / cap * scores) + 1.0))
    distance = shift + t[:, None] - j[None, :]
    mask = inside[None, :] & (distance >= 0)
    if WINDOWED:
        mask = mask & (distance < window)
    return tl.where(mask, scores * _LOG2_E, float("-inf"))


@triton.jit
def _dot(x, y, acc, TYPE: tl.constexpr):
    if tl.float32 == TYPE:
        return tl.dot(x, y, acc, input_precision="ieee")
    return tl.dot(x.to(TYPE), y, acc)


@triton.jit
def _first_seen(begin, shift, block, window, GROUP: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr):  # fmt: skip
    """The first key of a tile's range that any of its rows sees, at a tile's edge."""
    if WINDOWED:
        first = shift + block * BLOCK_M // GROUP - window + 1
        begin = tl.maximum(begin, tl.maximum(first, 0) // BLOCK_N * BLOCK_N)
    return begin


@triton.jit
def _forward(acc, m, total, q, K, k_s, V, v_s, t, begin, end, shift, scale, window,
             cap, TYPE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
             BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr):  # fmt: skip
    """Takes the keys from `begin` to `end` into the sums."""
    d = tl.arange(0, PADDED)
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        inside = j < end
        mask = inside[:, None] & (d < SIZE)[None, :]
        k = tl.load(K + j[:, None] * k_s + d[None, :], mask=mask, other=0.0)
        v = tl.load(V + j[:, None] * v_s + d[None, :], mask=mask, other=0.0)
        scores = _dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), TYPE) * scale
        scores = _seen(scores, t, j, inside, shift, window, cap, CAPPED, WINDOWED)
        largest = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - largest[:, None])
        shrink = tl.exp2(m - largest)
        acc = _dot(p, v, acc * shrink[:, None], TYPE)
        total = total * shrink + tl.sum(p, 1)
        m = largest
    return acc, m, total


@triton.jit
def _part(LENGTHS, sample, split, BLOCK_N: tl.constexpr):
    """Length of a sample's context, and the keys of one of its parts."""
    length = tl.load(LENGTHS + sample)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    return length, split * share, tl.minimum((split + 1) * share, length)


# The numbers of contexts and tokens lie anywhere in what is filled for a step.
_anywhere = triton.jit(do_not_specialize_on_alignment=["CONTEXTS", "LENGTHS"])


@_anywhere
def attend_forward(Q, K, V, CK, CV, CONTEXTS, LENGTHS, SINKS, OUT, SUMS, width,
                   key_heads, scale, window, cap, q_b, q_h, q_s, k_b, k_h, k_s, v_b,
                   v_h, v_s, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s, TYPE: tl.constexpr,
                   GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
                   FROZEN: tl.constexpr, CAPPED: tl.constexpr,
                   WINDOWED: tl.constexpr, SINKING: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """A tile of rows over one part of its context, the last part's over its own keys as well.

    OUT [parts, samples, T, heads, SIZE], SUMS float32 [parts, samples, key heads, T GROUP]: the
    logarithm to base 2 of the sum of exponentials.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    sample, head = (tl.program_id(2) // key_heads).to(tl.int64), tl.program_id(2) % key_heads
    r, t, g = _rows(block, GROUP, BLOCK_M)
    d = tl.arange(0, PADDED)
    real = r < width * GROUP
    mask = real[:, None] & (d < SIZE)[None, :]
    at = sample * q_b + (head * GROUP + g) * q_h + t * q_s
    q = tl.load(Q + at[:, None] + d[None, :], mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_M, PADDED), tl.float32)
    m = tl.full((BLOCK_M,), _NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if FROZEN:
        length, begin, end = _part(LENGTHS, sample, split, BLOCK_N)
        begin = _first_seen(begin, length, block, window, GROUP, BLOCK_M, BLOCK_N, WINDOWED)
        context = tl.load(CONTEXTS + sample)
        acc, m, total = _forward(acc, m, total, q, CK + context * ck_b + head * ck_h, ck_s,
                                 CV + context * cv_b + head * cv_h, cv_s, t, begin, end, length,
                                 scale, window, cap, TYPE, SIZE, PADDED, BLOCK_N, CAPPED,
                                 WINDOWED)  # fmt: skip
    if split == tl.num_programs(1) - 1:
        own_end = tl.minimum(((block + 1) * BLOCK_M - 1) // GROUP + 1, width)
        own_begin = _first_seen(0, 0, block, window, GROUP, BLOCK_M, BLOCK_N, WINDOWED)
        acc, m, total = _forward(acc, m, total, q, K + sample * k_b + head * k_h, k_s,
                                 V + sample * v_b + head * v_h, v_s, t, own_begin, own_end, 0,
                                 scale, window, cap, TYPE, SIZE, PADDED, BLOCK_N, CAPPED,
                                 WINDOWED)  # fmt: skip
        if SINKING:
            sink = tl.load(SINKS + head * GROUP + g).to(tl.float32) * _LOG2_E
            largest = tl.maximum(m, sink)
            shrink = tl.exp2(m - largest)
            total = total * shrink + tl.exp2(sink - largest)
            acc, m = acc * shrink[:, None], largest
    rows = width * GROUP
    samples = tl.num_programs(2) // key_heads
    row = ((split * samples + sample) * key_heads + head) * rows + r
    tl.store(SUMS + row, tl.where(total > 0, m + tl.log2(total), float("-inf")), mask=real)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = (split * samples + sample) * width + t
    at = (at * key_heads + head) * GROUP + g
    tl.store(OUT + at[:, None] * SIZE + d[None, :], acc.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts"])
def attend_join(PARTS, SUMS, OUT, WHOLE, width, key_heads, parts,
                GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
                BLOCK_M: tl.constexpr):  # fmt: skip
    """The parts of a context as one: OUT [samples, T, heads, SIZE], WHOLE like a part of SUMS."""
    block = tl.program_id(0)
    sample, head = (tl.program_id(1) // key_heads).to(tl.int64), tl.program_id(1) % key_heads
    r, t, g = _rows(block, GROUP, BLOCK_M)
    d = tl.arange(0, PADDED)
    real = r < width * GROUP
    mask = real[:, None] & (d < SIZE)[None, :]
    samples = tl.num_programs(1) // key_heads
    row = (sample * key_heads + head) * width * GROUP + r
    at = ((sample * width + t) * key_heads + head) * GROUP + g
    acc = tl.zeros((BLOCK_M, PADDED), tl.float32)
    m = tl.full((BLOCK_M,), _NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(parts):
        skip = split * samples * width * key_heads * GROUP
        of_part = tl.load(SUMS + skip + row, mask=real, other=float("-inf"))
        x = tl.load(PARTS + (skip + at)[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        largest = tl.maximum(m, of_part)
        weight, shrink = tl.exp2(of_part - largest), tl.exp2(m - largest)
        acc = acc * shrink[:, None] + x * weight[:, None]
        total = total * shrink + weight
        m = largest
    tl.store(WHOLE + row, m + tl.log2(total), mask=real)
    out = acc / total[:, None]
    tl.store(OUT + at[:, None] * SIZE + d[None, :], out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _chain(of_scores, scores, cap, CAPPED: tl.constexpr):
    """Gradients of what `_seen` was given, from those of what it made."""
    if CAPPED:
        x = scores / (_LOG2_E * cap)
        of_scores = tl.where(scores > float("-inf"), of_scores * (1.0 - x * x), 0.0)
    return of_scores


@triton.jit
def _queries(acc, q, do, of_row, delta, K, k_s, V, v_s, t, begin, end, shift, scale,
             window, cap, TYPE: tl.constexpr, SIZE: tl.constexpr,
             PADDED: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
             WINDOWED: tl.constexpr):  # fmt: skip
    """Adds what the keys from `begin` to `end` give to the gradient of queries."""
    d = tl.arange(0, PADDED)
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        inside = j < end
        mask = inside[:, None] & (d < SIZE)[None, :]
        k = tl.load(K + j[:, None] * k_s + d[None, :], mask=mask, other=0.0)
        v = tl.load(V + j[:, None] * v_s + d[None, :], mask=mask, other=0.0)
        zero = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
        scores = _dot(q, tl.trans(k), zero, TYPE) * scale
        scores = _seen(scores, t, j, inside, shift, window, cap, CAPPED, WINDOWED)
        p = tl.exp2(scores - of_row[:, None])
        ds = p * (_dot(do, tl.trans(v), zero, TYPE) - delta[:, None])
        ds = _chain(ds, scores, cap, CAPPED)
        acc = _dot(ds, k, acc, TYPE)
    return acc


@_anywhere
def attend_back_queries(Q, K, V, CK, CV, CONTEXTS, LENGTHS, OUT, DO, SUMS, DELTA, DQ,
                        width, key_heads, scale, window, cap, q_b, q_h, q_s, k_b,
                        k_h, k_s, v_b, v_h, v_s, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s,
                        TYPE: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
                        PADDED: tl.constexpr, FROZEN: tl.constexpr,
                        CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Gradients of queries, as `attend_forward` shares them: DQ [parts, samples, T, heads, SIZE].

    DELTA, like SUMS: the sum of each row's OUT times its gradient.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    sample, head = (tl.program_id(2) // key_heads).to(tl.int64), tl.program_id(2) % key_heads
    r, t, g = _rows(block, GROUP, BLOCK_M)
    d = tl.arange(0, PADDED)
    real = r < width * GROUP
    mask = real[:, None] & (d < SIZE)[None, :]
    at = sample * q_b + (head * GROUP + g) * q_h + t * q_s
    q = tl.load(Q + at[:, None] + d[None, :], mask=mask, other=0.0)
    at = ((sample * width + t) * key_heads + head) * GROUP + g
    do = tl.load(DO + at[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
    out = tl.load(OUT + at[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    row = (sample * key_heads + head) * width * GROUP + r
    of_row = tl.load(SUMS + row, mask=real, other=0.0)
    acc = tl.zeros((BLOCK_M, PADDED), tl.float32)
    if FROZEN:
        length, begin, end = _part(LENGTHS, sample, split, BLOCK_N)
        begin = _first_seen(begin, length, block, window, GROUP, BLOCK_M, BLOCK_N, WINDOWED)
        context = tl.load(CONTEXTS + sample)
        acc = _queries(acc, q, do, of_row, delta, CK + context * ck_b + head * ck_h, ck_s,
                       CV + context * cv_b + head * cv_h, cv_s, t, begin, end, length, scale,
                       window, cap, TYPE, SIZE, PADDED, BLOCK_N, CAPPED, WINDOWED)  # fmt: skip
    if split == tl.num_programs(1) - 1:
        tl.store(DELTA + row, delta, mask=real)
        own_end = tl.minimum(((block + 1) * BLOCK_M - 1) // GROUP + 1, width)
        own_begin = _first_seen(0, 0, block, window, GROUP, BLOCK_M, BLOCK_N, WINDOWED)
        acc = _queries(acc, q, do, of_row, delta, K + sample * k_b + head * k_h, k_s,
                       V + sample * v_b + head * v_h, v_s, t, own_begin, own_end, 0, scale, window,
                       cap, TYPE, SIZE, PADDED, BLOCK_N, CAPPED, WINDOWED)  # fmt: skip
    samples = tl.num_programs(2) // key_heads
    at = split * samples * width * key_heads * GROUP + at
    acc = (acc * scale).to(DQ.dtype.element_ty)
    tl.store(DQ + at[:, None] * SIZE + d[None, :], acc, mask=mask)


@triton.jit
def attend_back_keys(Q, K, V, DO, SUMS, DELTA, DK, DV, width, key_heads, scale,
                     window, cap, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
                     TYPE: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
                     PADDED: tl.constexpr, CAPPED: tl.constexpr,
                     WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr):  # fmt: skip
    """Gradients of the continuation's keys and values: [samples, T, key heads, SIZE] each."""
    sample, head = (tl.program_id(1) // key_heads).to(tl.int64), tl.program_id(1) % key_heads
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, PADDED)
    inside = j < width
    mask = inside[:, None] & (d < SIZE)[None, :]
    at = sample * k_b + head * k_h + j * k_s
    k = tl.load(K + at[:, None] + d[None, :], mask=mask, other=0.0)
    at = sample * v_b + head * v_h + j * v_s
    v = tl.load(V + at[:, None] + d[None, :], mask=mask, other=0.0)
    dk = tl.zeros((BLOCK_N, PADDED), tl.float32)
    dv = tl.zeros((BLOCK_N, PADDED), tl.float32)
    last = width * GROUP
    if WINDOWED:
        last = tl.minimum(last, ((tl.program_id(0) + 1) * BLOCK_N + window) * GROUP)
    for block in range(tl.program_id(0) * BLOCK_N * GROUP // BLOCK_M, tl.cdiv(last, BLOCK_M)):
        r, t, g = _rows(block, GROUP, BLOCK_M)
        real = r < width * GROUP
        of_rows = real[:, None] & (d < SIZE)[None, :]
        at = sample * q_b + (head * GROUP + g) * q_h + t * q_s
        q = tl.load(Q + at[:, None] + d[None, :], mask=of_rows, other=0.0)
        at = ((sample * width + t) * key_heads + head) * GROUP + g
        do = tl.load(DO + at[:, None] * SIZE + d[None, :], mask=of_rows, other=0.0)
        row = (sample * key_heads + head) * width * GROUP + r
        of_row = tl.load(SUMS + row, mask=real, other=float("inf"))
        delta = tl.load(DELTA + row, mask=real, other=0.0)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = _dot(q, tl.trans(k), zero, TYPE) * scale
        scores = _seen(scores, t, j, inside, 0, window, cap, CAPPED, WINDOWED)
        p = tl.exp2(scores - of_row[:, None])
        dv = _dot(tl.trans(p), do, dv, TYPE)
        ds = p * (_dot(do, tl.trans(v), zero, TYPE) - delta[:, None])
        ds = _chain(ds, scores, cap, CAPPED)
        dk = _dot(tl.trans(ds), q, dk, TYPE)
    at = (sample * width + j) * key_heads + head
    tl.store(DK + at[:, None] * SIZE + d[None, :], (dk * scale).to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + at[:, None] * SIZE + d[None, :], dv.to(DV.dtype.element_ty), mask=mask)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class _Shape:
    """Sizes of one call, and what its kernels are compiled for."""

    def __init__(self, query: Tensor, key: Tensor, frozen: Frozen | None, rule: Rule):
        self.samples, self.heads, self.width, size = query.shape
        self.key_heads, self.rule, self.frozen = key.shape[1], rule, frozen
        single = query.dtype == torch.float32
        self.rows = 32 if single else 64
        self.common = {
            "TYPE": _TYPES[query.dtype],
            "GROUP": self.heads // self.key_heads,
            "SIZE": size,
            "PADDED": max(16, triton.next_power_of_2(size)),
            "CAPPED": rule.cap > 0,
            "WINDOWED": rule.window > 0,
            "BLOCK_N": 32 if single else 64,
        }
        self.blocks = triton.cdiv(self.width * self.common["GROUP"], self.rows)
        self.splits = 1
        if frozen is not None:
            width = frozen.keys.shape[2]
            wanted = triton.cdiv(_PROGRAMS, self.blocks * self.samples * self.key_heads)
            self.splits = max(1, min(wanted, width // _SHORTEST_PART))

    @property
    def numbers(self) -> tuple[float, ...]:
        """What every kernel is told."""
        rule = self.rule
        return self.width, self.key_heads, rule.scale, rule.window, rule.cap

    def context(self, query: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Tensors and strides of the context; any will do where there is none."""
        if self.frozen is None:
            return (query,) * 4, (0,) * 6
        f = self.frozen
        return (f.keys, f.values, f.rows, f.lengths), (*f.keys.stride()[:3], *f.values.stride()[:3])

    def stages(self, most: int) -> dict[str, int]:
        """Of a kernel's loads; wide heads leave room for two."""
        return {"num_warps": 4, "num_stages": most if self.common["PADDED"] <= 128 else 2}


class _Attention(torch.autograd.Function):
    """See `attend`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, frozen: Frozen | None,
        rule: Rule,
    ) -> Tensor:  # fmt: skip
        shape = _Shape(q, k, frozen, rule)
        size, n = q.shape[-1], shape.splits
        sizes = (shape.samples, shape.width, shape.heads, size)
        out, sums = q.new_empty(sizes), _floats(q, shape)
        parts = out if n == 1 else q.new_empty(n, *sizes)
        of_parts = sums if n == 1 else torch.empty((n, *sums.shape), device=q.device)
        tensors, strides = shape.context(q)
        grid = (shape.blocks, n, shape.samples * shape.key_heads)
        attend_forward[grid](
            q, k, v, *tensors, q if sinks is None else sinks, parts, of_parts, *shape.numbers,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, **shape.common,
            FROZEN=frozen is not None, SINKING=sinks is not None, BLOCK_M=shape.rows,
            **shape.stages(3),
        )  # fmt: skip
        if n > 1:
            common = {name: shape.common[name] for name in ("GROUP", "SIZE", "PADDED")}
            blocks = triton.cdiv(shape.width * common["GROUP"], 16)
            attend_join[(blocks, grid[2])](
                parts, of_parts, out, sums, *shape.numbers[:2], n, **common, BLOCK_M=16
            )
        ctx.save_for_backward(q, k, v, out, sums, sinks)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, sinks = ctx.saved_tensors
        shape, do = ctx.shape, grads[0].contiguous()
        size, n, delta = q.shape[-1], shape.splits, torch.empty_like(sums)
        dq = torch.empty(
            (n, *out.shape), dtype=q.dtype if n == 1 else torch.float32, device=q.device
        )
        tensors, strides = shape.context(q)
        own = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        pairs = shape.samples * shape.key_heads
        attend_back_queries[(shape.blocks, n, pairs)](
            q, k, v, *tensors, out, do, sums, delta, dq, *shape.numbers, *own, *strides,
            **shape.common, FROZEN=shape.frozen is not None, BLOCK_M=shape.rows,
            **shape.stages(3),
        )  # fmt: skip
        dk, dv = (q.new_empty(shape.samples, shape.width, shape.key_heads, size) for _ in range(2))
        rows = shape.rows if size <= 128 else 32
        attend_back_keys[(triton.cdiv(shape.width, shape.common["BLOCK_N"]), pairs)](
            q, k, v, do, sums, delta, dk, dv, *shape.numbers, *own, **shape.common, BLOCK_M=rows,
            **shape.stages(2),
        )  # fmt: skip
        of_sinks = None if sinks is None else _of_sinks(sinks, sums, delta, shape)
        dq = dq[0] if n == 1 else dq.sum(0)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), of_sinks, None, None


def _floats(q: Tensor, shape: _Shape) -> Tensor:
    """A number a row: [samples, key heads, T group]."""
    rows = shape.width * shape.heads // shape.key_heads
    return torch.empty((shape.samples, shape.key_heads, rows), device=q.device)


def _of_sinks(sinks: Tensor, sums: Tensor, delta: Tensor, shape: _Shape) -> Tensor:
    """The gradient of the sinks [heads]: a sink's part of a row's softmax has no value."""
    group = shape.heads // shape.key_heads
    rows = (shape.samples, shape.key_heads, shape.width, group)
    scores = sinks.float().view(shape.key_heads, 1, group) * 1.4426950408889634
    part = torch.exp2(scores - sums.view(rows))
    return -(part * delta.view(rows)).sum((0, 2)).view(-1).to(sinks.dtype)

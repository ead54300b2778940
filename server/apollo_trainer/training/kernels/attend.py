"""Tiles of attention to a context and to oneself: rows are the queries of a group of heads.

Softmax by parts: Dao et al., arXiv 2205.14135, equation 4 of arXiv 2307.08691.
"""

# Triton reads the source of its functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-1e30)  # a largest score where no key was seen


@triton.jit
def _tile(block, width, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
          BLOCK_M: tl.constexpr):  # fmt: skip
    """Rows of a tile, token by token and of each the heads of a group; and which of it is real."""
    r, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    real = r < width * GROUP
    return r, r // GROUP, r % GROUP, d, real, real[:, None] & (d < SIZE)[None, :]


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
    r, t, g, d, real, mask = _tile(block, width, GROUP, SIZE, PADDED, BLOCK_M)
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
    r, t, g, d, real, mask = _tile(block, width, GROUP, SIZE, PADDED, BLOCK_M)
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
    r, t, g, d, real, mask = _tile(block, width, GROUP, SIZE, PADDED, BLOCK_M)
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
        r, t, g, _, real, of_rows = _tile(block, width, GROUP, SIZE, PADDED, BLOCK_M)
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

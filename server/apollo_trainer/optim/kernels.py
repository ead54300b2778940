"""Triton kernels of the fused step: many matrices a launch, each gradient read twice.

A launch works through a table: row `i` of `tiles` (int32) names a matrix and a tile of it, row `m`
of `desc` (int64, columns below) says where that matrix lies. All offsets are 64 bits wide. Sums
over tiles go through memory in a fixed order, never through float atomics, so that a step has the
same bits however its launches are grouped.

Symbols as in `reference.py`: channels are indices of the matrix's larger side (n of them), `k` is
its smaller side, P the projection [r, k], R = P G [r, n].
"""

# Triton reads the source of these functions, with its own types; mypy and docstring rules of
# plain Python do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

# Columns of `desc`.
W_PTR = tl.constexpr(0)
G_PTR = tl.constexpr(1)
M_PTR = tl.constexpr(2)
V_PTR = tl.constexpr(3)
LOW_PTR = tl.constexpr(4)
NORM_PTR = tl.constexpr(5)
STEP_PTR = tl.constexpr(6)
ROWS = tl.constexpr(7)
COLS = tl.constexpr(8)
W_ROW = tl.constexpr(9)
W_COL = tl.constexpr(10)
G_ROW = tl.constexpr(11)
G_COL = tl.constexpr(12)
FIRST = tl.constexpr(13)  # number of its first element within the parameter
P_KEY = tl.constexpr(14)
ROUND_KEY = tl.constexpr(16)
P_OFFSET = tl.constexpr(18)
R_OFFSET = tl.constexpr(19)
S_OFFSET = tl.constexpr(20)
PART_OFFSET = tl.constexpr(21)
PARTS = tl.constexpr(22)
SLOT = tl.constexpr(23)
STACKED = tl.constexpr(24)
GROUP = tl.constexpr(25)
ALPHA = tl.constexpr(26)  # the bits of a float64
FIELDS = tl.constexpr(27)

# Columns of `settings` (float64), a row a parameter group.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
DECAY = tl.constexpr(4)
GROWTH = tl.constexpr(5)  # 0: no limiter
REFRESH = tl.constexpr(6)
SETTINGS = tl.constexpr(8)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _blocks(block, step, k0, k1):
    """The four words of each Philox block (int64 numbers)."""
    zero = (block * 0).to(tl.uint32)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    s0 = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    s1 = zero + (step >> 32).to(tl.uint32)
    return _philox(low, high, s0, s1, zero + k0.to(tl.uint32), zero + k1.to(tl.uint32))


@triton.jit
def _bits16(element, step, k0, k1):
    """16 random bits of each element by its number, as `philox.draw_16_bits` draws them."""
    w0, w1, w2, w3 = _blocks(element >> 3, step, k0, k1)
    which = ((element >> 1) & 3).to(tl.int32)
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return tl.where((element & 1) == 1, word >> 16, word & 0xFFFF)


@triton.jit
def _bits16_of_blocks(block, step, k0, k1):
    """The same for whole blocks: eight elements for one draw, in three more dimensions of 2."""
    w0, w1, w2, w3 = _blocks(block, step, k0, k1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def draw_projections(desc, tiles, table, P, number, settings, RANK: tl.constexpr,
                     RANK_PADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Entries of P, unscaled, in bfloat16; rows beyond the rank are zero."""
    d = desc + tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64) * FIELDS
    first = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    k = tl.minimum(tl.load(d + ROWS), tl.load(d + COLS))
    element = first + tl.arange(0, BLOCK).to(tl.int64)
    settings += tl.load(d + GROUP) * SETTINGS
    refresh = tl.load(settings + REFRESH).to(tl.int64)
    window = (tl.load(number) - 1) // refresh
    block = (first >> 3) + tl.arange(0, BLOCK // 8)
    bits = _bits16_of_blocks(block, window, tl.load(d + P_KEY), tl.load(d + P_KEY + 1))
    bits = tl.reshape(bits, (BLOCK,))
    value = tl.load(table + bits.to(tl.int64))
    value = tl.where(element < RANK * k, value, 0.0)
    tl.store(P + tl.load(d + P_OFFSET) + element, value, mask=element < RANK_PADDED * k)


@triton.jit
def project(desc, tiles, P, R, squares, flags, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
            ROW_CHANNELS: tl.constexpr, G_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
            G_TYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
            EXACT: tl.constexpr):  # fmt: skip
    """R = T G for the unscaled T, and |G_j|^2 of each channel: the first read of G."""
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    d = desc + matrix * FIELDS
    rows, cols = tl.load(d + ROWS), tl.load(d + COLS)
    if ROW_CHANNELS:
        n, k, g_n, g_k = rows, cols, tl.load(d + G_ROW), tl.load(d + G_COL)
    else:
        n, k, g_n, g_k = cols, rows, tl.load(d + G_COL), tl.load(d + G_ROW)
    G = tl.load(d + G_PTR).to(tl.pointer_type(G_TYPE))
    p_base = P + tl.load(d + P_OFFSET)
    if ALIGNED:
        G = tl.multiple_of(G, 16)
        p_base = tl.multiple_of(p_base, 16)
        n, k = tl.multiple_of(n, 8), tl.multiple_of(k, 8)
        if G_UNIT == 1:
            g_n = tl.multiple_of(g_n, 8)
        else:
            g_k = tl.multiple_of(g_k, 8)
    j = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK_PADDED)
    acc = tl.zeros((RANK_PADDED, BLOCK_N), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for k0 in range(0, k, BLOCK_K):
        i = k0 + tl.arange(0, BLOCK_K)
        p_at = p_base + r[:, None] * k + i[None, :]
        p = tl.load(p_at, mask=(i < k)[None, :], other=0.0, eviction_policy="evict_last")
        if G_UNIT == 1:  # along the smaller side
            mask = (j < n)[:, None] & (i < k)[None, :]
            g_at = G + j[:, None] * g_n + i[None, :]
            g = tl.load(g_at, mask=mask, other=0.0, eviction_policy="evict_first")
            g32 = g.to(tl.float32)
            square += tl.sum(g32 * g32, 1)
            g = tl.trans(g)
        else:
            mask = (i < k)[:, None] & (j < n)[None, :]
            if G_UNIT == 2:
                g = tl.load(G + i[:, None] * g_k + j[None, :], mask=mask, other=0.0)
            else:
                g = tl.load(G + i[:, None] * g_k + j[None, :] * g_n, mask=mask, other=0.0)
            g32 = g.to(tl.float32)
            square += tl.sum(g32 * g32, 0)
        if EXACT:
            acc = tl.dot(p.to(tl.float32), g.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(p, g, acc)
    out = R + tl.load(d + R_OFFSET) + r[:, None] * n + j[None, :]
    tl.store(out, acc, mask=(r < RANK)[:, None] & (j < n)[None, :])
    tl.store(squares + tl.load(d + S_OFFSET) + j, square, mask=j < n)
    # Squares of NaN and infinity stay such; so a flag of each kind says all about the matrix.
    bad = (j < n) & ~(square < float("inf"))
    tl.atomic_max(flags + 2 * matrix, tl.max(bad.to(tl.int32), 0))
    tl.atomic_max(flags + 2 * matrix + 1, tl.max((square > 0).to(tl.int32), 0))


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, by squaring."""
    result = base * 0 + 1.0
    for _ in range(48):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _active(flags, matrix, stacked):
    """Whether a matrix is stepped: finite, and, in a stack, reached by any token."""
    bad = tl.load(flags + 2 * matrix)
    reached = tl.load(flags + 2 * matrix + 1)
    return (bad == 0) & ((stacked == 0) | (reached == 1))


@triton.jit
def moments(desc, tiles, settings, R, squares, factors, parts, flags, root_rank,
            RANK: tl.constexpr, BLOCK_R: tl.constexpr, MINI: tl.constexpr,
            ROW_CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Both moments, and s_j = |R~_j| / |R_j|; or, for MINI, the sums that make the one s."""
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    block = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64)
    d = desc + matrix * FIELDS
    n = tl.maximum(tl.load(d + ROWS), tl.load(d + COLS))
    written = tl.where(_active(flags, matrix, tl.load(d + STACKED)), n, 0)
    m = tl.load(d + M_PTR).to(tl.pointer_type(tl.float32))
    v = tl.load(d + V_PTR).to(tl.pointer_type(tl.float32))
    t = tl.load(tl.load(d + STEP_PTR).to(tl.pointer_type(tl.int64))) + 1
    settings += tl.load(d + GROUP) * SETTINGS
    beta1, beta2 = tl.load(settings + BETA1), tl.load(settings + BETA2)
    correction1 = (1.0 - _power(beta1, t)).to(tl.float32)
    correction2 = (1.0 - _power(beta2, t)).to(tl.float32)
    b1, b2 = beta1.to(tl.float32), beta2.to(tl.float32)
    c1, c2 = (1.0 - beta1).to(tl.float32), (1.0 - beta2).to(tl.float32)
    eps = tl.load(settings + EPS).to(tl.float32)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    plain = tl.zeros((BLOCK_N,), tl.float32)
    scaled = tl.zeros((BLOCK_N,), tl.float32)
    for r0 in tl.static_range(0, RANK, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        at = r[:, None] * n + j[None, :]
        mask = (r < RANK)[:, None] & (j < n)[None, :]
        x = tl.load(R + tl.load(d + R_OFFSET) + at, mask=mask, other=0.0) * root_rank
        new_m = tl.load(m + at, mask=mask, other=0.0) * b1 + x * c1
        new_v = tl.load(v + at, mask=mask, other=0.0) * b2 + x * x * c2
        kept = (r < RANK)[:, None] & (j < written)[None, :]
        tl.store(m + at, new_m, mask=kept)
        tl.store(v + at, new_v, mask=kept)
        direction = (new_m / correction1) / (tl.sqrt(new_v / correction2) + eps)
        scaled += tl.sum(tl.where(mask, direction * direction, 0.0), 0)
        plain += tl.sum(x * x, 0)
    square = tl.load(squares + tl.load(d + S_OFFSET) + j, mask=j < n, other=0.0)
    part = parts + (tl.load(d + PART_OFFSET) + block) * 3
    if MINI:
        tl.store(part, tl.sum(scaled, 0))
        tl.store(part + 1, tl.sum(plain, 0))
        tl.store(part + 2, tl.sum(square, 0))
    else:
        s = tl.where(plain > 0, tl.sqrt(scaled) / tl.sqrt(plain), 0.0)
        tl.store(factors + tl.load(d + S_OFFSET) + j, s, mask=j < n)
        tl.store(part, tl.sum(s * s * square, 0))


@triton.jit
def _sum_parts(parts, count, column: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(parts + i * 3 + column, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def limit(desc, settings, parts, flags, rates, slot_flags, norm_floor, MINI: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """A program a matrix: the limiter, lr * alpha * factor, the step count, what is skipped."""
    matrix = tl.program_id(0).to(tl.int64)
    d = desc + matrix * FIELDS
    part, count = parts + tl.load(d + PART_OFFSET) * 3, tl.load(d + PARTS)
    if MINI:
        plain = _sum_parts(part, count, 1, BLOCK)
        s = tl.where(plain > 0, tl.sqrt(_sum_parts(part, count, 0, BLOCK)) / tl.sqrt(plain), 0.0)
        norm = s * tl.sqrt(_sum_parts(part, count, 2, BLOCK))
    else:
        norm = tl.sqrt(_sum_parts(part, count, 0, BLOCK))
        s = norm * 0.0 + 1.0
    active = _active(flags, matrix, tl.load(d + STACKED)) & (norm < float("inf"))
    settings += tl.load(d + GROUP) * SETTINGS
    growth = tl.load(settings + GROWTH).to(tl.float32)
    previous_at = tl.load(d + NORM_PTR).to(tl.pointer_type(tl.float32))
    previous = tl.load(previous_at)
    elements = (tl.load(d + ROWS) * tl.load(d + COLS)).to(tl.float32)
    cap = tl.maximum(previous * growth, norm_floor * tl.sqrt(elements))
    limited = (growth > 0) & (previous > 0) & (norm > cap)
    factor = tl.where(limited, cap / norm, 1.0)
    tl.store(previous_at, tl.where(active & (norm > 0), norm * factor, previous))
    step_at = tl.load(d + STEP_PTR).to(tl.pointer_type(tl.int64))
    tl.store(step_at, tl.load(step_at) + active.to(tl.int64))
    alpha = tl.load(d + ALPHA).to(tl.float64, bitcast=True)
    lr = (tl.load(settings + LR) * alpha).to(tl.float32)
    tl.store(rates + 2 * matrix, s * factor * lr)
    tl.store(rates + 2 * matrix + 1, active.to(tl.float32))
    bad = (tl.load(flags + 2 * matrix) != 0) | ~(norm < float("inf"))
    tl.atomic_max(slot_flags + tl.load(d + SLOT), bad.to(tl.int32))


@triton.jit
def _within_range(new):
    """Cuts finite values at the largest bfloat16, as `rounding._within_range` does."""
    largest = 3.3895313892515355e38
    return tl.where(tl.abs(new) < float("inf"), tl.clamp(new, -largest, largest), new)


@triton.jit
def _round_up(new, bits, W_TYPE: tl.constexpr):
    """float32 to bfloat16, up with the probability of what is cut off."""
    raised = (new.to(tl.int32, bitcast=True) + bits.to(tl.int32)) & -65536
    finite = tl.abs(new) < float("inf")
    return tl.where(finite, raised.to(tl.float32, bitcast=True), new).to(W_TYPE)


@triton.jit
def write(desc, tiles, settings, factors, rates, number, changes,
          W_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ROW_CHANNELS: tl.constexpr,
          W_UNIT: tl.constexpr, G_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
          MINI: tl.constexpr, STOCHASTIC: tl.constexpr, SPLIT: tl.constexpr,
          MEASURE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):  # fmt: skip
    """W <- W (1 - lr lambda) - lr alpha G diag(s), rounded: the second read of G.

    *_UNIT: 1 where the elements of a row are neighbours, 2 those of a column, 0 neither.
    """
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64)
    d = desc + matrix * FIELDS
    rows, cols = tl.load(d + ROWS), tl.load(d + COLS)
    w_row, w_col = tl.load(d + W_ROW), tl.load(d + W_COL)
    g_row, g_col = tl.load(d + G_ROW), tl.load(d + G_COL)
    W = tl.load(d + W_PTR).to(tl.pointer_type(W_TYPE))
    G = tl.load(d + G_PTR).to(tl.pointer_type(G_TYPE))
    if ALIGNED:
        W, G = tl.multiple_of(W, 16), tl.multiple_of(G, 16)
        rows, cols = tl.multiple_of(rows, 8), tl.multiple_of(cols, 8)
        w_row, g_row = tl.multiple_of(w_row, 8), tl.multiple_of(g_row, 8)
    rate = tl.load(rates + 2 * matrix)
    # A matrix that is not stepped has no rows to write.
    rows = tl.where(tl.load(rates + 2 * matrix + 1) > 0.5, rows, 0)
    across = tl.cdiv(cols, BLOCK_COLS)
    a = (tile // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_col = (tile % across) * BLOCK_COLS
    b = first_col + tl.arange(0, BLOCK_COLS)
    mask = (a < rows)[:, None] & (b < cols)[None, :]
    if W_UNIT == 1:
        at = W + a[:, None] * w_row + b[None, :]
    elif W_UNIT == 2:
        at = W + a[:, None] + b[None, :] * w_col
    else:
        at = W + a[:, None] * w_row + b[None, :] * w_col
    if G_UNIT == 1:
        g_at = G + a[:, None] * g_row + b[None, :]
    elif G_UNIT == 2:
        g_at = G + a[:, None] + b[None, :] * g_col
    else:
        g_at = G + a[:, None] * g_row + b[None, :] * g_col
    stored = tl.load(at, mask=mask, other=0.0)
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    if MINI:
        update = g * rate
    elif ROW_CHANNELS:
        s = tl.load(factors + tl.load(d + S_OFFSET) + a, mask=a < rows, other=0.0)
        update = g * (s * rate)[:, None]
    else:
        s = tl.load(factors + tl.load(d + S_OFFSET) + b, mask=b < cols, other=0.0)
        update = g * (s * rate)[None, :]
    old = stored.to(tl.float32)
    if SPLIT:
        low_at = tl.load(d + LOW_PTR).to(tl.pointer_type(tl.int16))
        low_at = low_at + a[:, None] * cols + b[None, :]
        low = tl.load(low_at, mask=mask, other=0).to(tl.int32)
        old = (old.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
    settings += tl.load(d + GROUP) * SETTINGS
    decay = tl.load(settings + DECAY).to(tl.float32)
    new = old * decay - update
    if tl.float32 == W_TYPE:
        rounded = new
    elif SPLIT:
        whole = _within_range(new).to(tl.int32, bitcast=True)
        upper = (whole + 0x8000) & -65536
        rounded = upper.to(tl.float32, bitcast=True).to(W_TYPE)
        tl.store(low_at, (whole - upper).to(tl.int16), mask=mask)
    elif STOCHASTIC:
        k0, k1 = tl.load(d + ROUND_KEY), tl.load(d + ROUND_KEY + 1)
        base = tl.load(d + FIRST) + a * cols
        step = tl.load(number)
        if ALIGNED:
            blocks = (first_col >> 3) + tl.arange(0, BLOCK_COLS // 8)
            bits = _bits16_of_blocks((base >> 3)[:, None] + blocks[None, :], step, k0, k1)
            bits = tl.reshape(bits, (BLOCK_ROWS, BLOCK_COLS))
        else:
            bits = _bits16(base[:, None] + b[None, :], step, k0, k1)
        rounded = _round_up(_within_range(new), bits, W_TYPE)
    else:
        rounded = _within_range(new).to(W_TYPE)
    tl.store(at, rounded, mask=mask)
    if MEASURE:
        difference = tl.where(mask, rounded.to(tl.float32) - stored.to(tl.float32), 0.0)
        out = changes + 2 * tl.program_id(0).to(tl.int64)
        tl.store(out, tl.sum(tl.sum((difference * difference).to(tl.float64), 1), 0))
        # A difference of zero with other bits is -0 for +0: too rare to count apart.
        tl.store(out + 1, tl.sum(tl.sum((difference != 0).to(tl.float64), 1), 0))


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
def adam_write(desc, tiles, settings, flags, slot_flags, number, changes, W_TYPE: tl.constexpr,
               G_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, SPLIT: tl.constexpr,
               MEASURE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
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
    correction1 = (1.0 - _power(beta1, t)).to(tl.float32)
    correction2 = (1.0 - _power(beta2, t)).to(tl.float32)
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
        low = tl.load(low_at, mask=mask, other=0).to(tl.int32)
        old = (old.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
    new = old * tl.load(settings + DECAY).to(tl.float32) - update
    if tl.float32 == W_TYPE:
        rounded = new
    elif SPLIT:
        whole = _within_range(new).to(tl.int32, bitcast=True)
        upper = (whole + 0x8000) & -65536
        rounded = upper.to(tl.float32, bitcast=True).to(W_TYPE)
        tl.store(low_at, (whole - upper).to(tl.int16), mask=mask)
    elif STOCHASTIC:
        bits = _bits16(i, tl.load(number), tl.load(d + ROUND_KEY), tl.load(d + ROUND_KEY + 1))
        rounded = _round_up(_within_range(new), bits, W_TYPE)
    else:
        rounded = _within_range(new).to(W_TYPE)
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

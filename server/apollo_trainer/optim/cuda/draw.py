"""Random numbers on the device: the bits of `philox.py`, and the projections made of them."""

# Triton reads the source of these functions, with its own types; mypy's rules do not apply to them.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from apollo_trainer.optim.cuda.columns import (
    BETA1,
    COLS,
    CUT_AT,
    CUT_COLS,
    CUT_NONE,
    CUT_ROWS,
    FIELDS,
    FIRST,
    FIRST_SHIFT,
    GROUP,
    P_KEY,
    P_OFFSET,
    REFRESH,
    ROOT_COLS,
    ROOT_ROWS,
    ROUND_KEY,
    ROWS,
    SECOND_SHIFT,
    SETTINGS,
    STEP_PTR,
)


@triton.jit
def keys_of(k0, k1):
    """The keys of Philox's ten rounds, two of each."""
    k0, k1, keys = k0.to(tl.uint32), k1.to(tl.uint32), ()
    for _ in tl.static_range(10):
        keys += (k0, k1)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return keys


@triton.jit
def _philox(c0, c1, c2, c3, keys):
    # One instruction makes all 64 bits of a product, where its halves apart would take two.
    for i in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ keys[2 * i]
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ keys[2 * i + 1]
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _blocks(block, step, keys):
    """The four words of each Philox block (int64 numbers)."""
    zero = (block * 0).to(tl.uint32)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    s0 = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    s1 = zero + (step >> 32).to(tl.uint32)
    return _philox(low, high, s0, s1, keys)


@triton.jit
def bits16(element, step, k0, k1):
    """16 random bits of each element by its number, as `philox.draw_16_bits` draws them."""
    w0, w1, w2, w3 = _blocks(element >> 3, step, keys_of(k0, k1))
    which = ((element >> 1) & 3).to(tl.int32)
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return tl.where((element & 1) == 1, word >> 16, word & 0xFFFF)


@triton.jit
def bits16_of_blocks(block, step, keys):
    """The same for whole blocks: eight elements for one draw, in three more dimensions of 2."""
    w0, w1, w2, w3 = _blocks(block, step, keys)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def draws(d, number, STOCHASTIC: tl.constexpr):
    """What bits of a matrix are drawn with: its first element, the step, the keys, its part."""
    drawn = (0, 0, 0, 0, 0, 0)
    if STOCHASTIC:
        k0, k1 = tl.load(d + ROUND_KEY), tl.load(d + ROUND_KEY + 1)
        drawn = (tl.load(d + FIRST), tl.load(number), k0, k1, keys_of(k0, k1), d)
    return drawn


@triton.jit
def in_whole(i, d):
    """The number of a row, column or element in the whole, of which this is a part."""
    at, one, other = tl.load(d + CUT_AT), tl.load(d + FIRST_SHIFT), tl.load(d + SECOND_SHIFT)
    return i + tl.where(i < at, one, other)


@triton.jit
def bits_of_tile(drawn, a, first_col, cols, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                 BLOCK_COLS: tl.constexpr, CUT: tl.constexpr):  # fmt: skip
    """16 random bits of each element of rows a and the columns from the first on."""
    first, step, k0, k1, keys, d = drawn
    if CUT != CUT_NONE:
        cols = tl.load(d + ROOT_COLS)
    if CUT == CUT_ROWS:
        a = in_whole(a, d)
    if ALIGNED:
        blocks = (first_col >> 3) + tl.arange(0, BLOCK_COLS // 8)
        if CUT == CUT_COLS:
            blocks = in_whole(blocks * 8, d) >> 3
        blocks = ((first >> 3) + wide(a, cols >> 3))[:, None] + blocks[None, :]
        bits = tl.reshape(bits16_of_blocks(blocks, step, keys), (BLOCK_ROWS, BLOCK_COLS))
    else:
        b = first_col + tl.arange(0, BLOCK_COLS)
        if CUT == CUT_COLS:
            b = in_whole(b, d)
        bits = bits16((first + wide(a, cols))[:, None] + b[None, :], step, k0, k1)
    return bits


@triton.jit
def wide(x, y):
    """A product of numbers below 2 ** 32 in 64 bits: one instruction, where int64 takes four."""
    return x.to(tl.uint32).to(tl.int64) * y.to(tl.uint32).to(tl.int64)


@triton.jit
def power(base, exponent):
    """base ** exponent in float64, by squaring."""
    result = base * 0 + 1.0
    for _ in range(48):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def draw_projections(desc, tiles, table, P, corrections, number, settings, RANK: tl.constexpr,
                     RANK_PADDED: tl.constexpr, ROW_CHANNELS: tl.constexpr, CUT: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Entries of P, unscaled, in bfloat16; rows beyond the rank are zero.

    Where ranks divide the smaller side, each has the columns of P that are of its part.
    The first program of a matrix also leaves 1 / (1 - beta ** t) of both moments.
    """
    matrix = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64)
    d = desc + matrix * FIELDS
    settings += tl.load(d + GROUP) * SETTINGS
    if tile == 0:
        t = tl.load(tl.load(d + STEP_PTR).to(tl.pointer_type(tl.int64))) + 1
        for i in tl.static_range(2):
            correction = 1.0 / (1.0 - power(tl.load(settings + BETA1 + i), t))
            tl.store(corrections + 2 * matrix + i, correction.to(tl.float32))
    first = tile * BLOCK
    k = tl.load(d + COLS) if ROW_CHANNELS else tl.load(d + ROWS)
    element = first + tl.arange(0, BLOCK).to(tl.int64)
    refresh = tl.load(settings + REFRESH).to(tl.int64)
    window = (tl.load(number) - 1) // refresh
    k0, k1 = tl.load(d + P_KEY), tl.load(d + P_KEY + 1)
    if (CUT_COLS if ROW_CHANNELS else CUT_ROWS) == CUT:
        width = tl.load(d + ROOT_COLS) if ROW_CHANNELS else tl.load(d + ROOT_ROWS)
        bits = bits16(element // k * width + in_whole(element % k, d), window, k0, k1)
    else:
        block = (first >> 3) + tl.arange(0, BLOCK // 8)
        bits = tl.reshape(bits16_of_blocks(block, window, keys_of(k0, k1)), (BLOCK,))
    # The table is odd: half of it fits the fast memory beside the tensor cores.
    upper = (bits >> 15) == 1
    magnitude = tl.where(upper, bits & 0x7FFF, 0x7FFF - bits).to(tl.int32)
    value = tl.gather(tl.load(table + 0x8000 + tl.arange(0, 0x8000)), magnitude, 0).to(tl.float32)
    value = tl.where(upper, value, -value)
    value = tl.where(element < RANK * k, value, 0.0)
    tl.store(P + tl.load(d + P_OFFSET) + element, value, mask=element < RANK_PADDED * k)

"""The optimizer's loops over memory, compiled for the CPU that they run on.

Numbers come as bit patterns: bfloat16 as uint16, float32 as uint32. Matrices come as the memory
`X` that they lie in, from their first element to their last, with the place `x_at` of the first
element that is meant and the distance `x_next` between two rows; the elements of a row are
neighbours. All other arrays have no gaps.

No sum depends on how a loop was vectorised: what is added up in parallel is added up in LANES
sums, whatever the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Loop = TypeVar("Loop", bound=Callable[..., Any])

LANES = 64
_BLOCK = 16  # columns that are transposed together: a cache line of float32

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

_SIGN, _MAGNITUDE = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_INFINITY, _NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)
_SIXTEEN = np.uint32(16)
_MANTISSA, _TWICE_THE_BIAS = np.uint32(23), np.uint32(254)
# Below 2**-14, float32's exponent 113, numbers of float16 are 2**-24 apart.
_SMALLEST_HALF, _TEN = np.uint32(113), np.uint32(10)
_THREE, _OF_13_BITS = np.uint16(3), np.float32(2.0**-13)


def _compiled(function: Loop) -> Loop:
    """Compiles at the first call. The interpreter's lock is released while the loop runs."""
    loop: Loop = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)
    return loop


@_compiled
def draw_words(words: Array, first: int, step: int, key_0: int, key_1: int) -> None:
    """Fills words (uint32 [4 blocks]) from Philox blocks `first`, `first + 1`, ... (philox.py).

    They are computed in 64 bits, as a product of two needs them.
    """
    for b in range(words.size // 4):
        block, upper = np.uint64(first + b), np.uint64(step)
        c0, c1, c2, c3 = block & _MASK, block >> _HALF, upper & _MASK, upper >> _HALF
        k0, k1 = np.uint64(key_0), np.uint64(key_1)
        for _ in range(10):
            product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
            c0, c1 = ((product_1 >> _HALF) ^ c1 ^ k0) & _MASK, product_1
            c2, c3 = ((product_0 >> _HALF) ^ c3 ^ k1) & _MASK, product_0
            k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
        words[4 * b] = np.uint32(c0)
        words[4 * b + 1] = np.uint32(c1)
        words[4 * b + 2] = np.uint32(c2)
        words[4 * b + 3] = np.uint32(c3)


@_compiled
def look_up(table: Array, places: Array, scale: float, out: Array) -> None:
    """Writes table[places] * scale."""
    for j in range(out.size):
        out[j] = table[places[j]] * scale


@_compiled
def widen(X: Array, x_at: int, x_next: int, rows: int, width: int, out: Array, next: int) -> None:
    """Copies rows as float32 bit patterns into the rows of `out`, which are `next` apart."""
    shift = np.uint32(16 if X.itemsize == 2 else 0)
    for i in range(rows):
        row, target = X[x_at + i * x_next :][:width], out[i * next :][:width]
        for j in range(width):
            target[j] = np.uint32(row[j]) << shift


@_compiled
def widen_transposed(
    X: Array, x_at: int, x_next: int, rows: int, width: int, out: Array, next: int
) -> None:
    """Copies columns as float32 bit patterns into the rows of `out`, which are `next` apart."""
    shift = np.uint32(16 if X.itemsize == 2 else 0)
    for start in range(0, width, _BLOCK):
        count = min(_BLOCK, width - start)
        for i in range(rows):
            part = X[x_at + i * x_next + start :][:count]
            first = start * next + i
            for j in range(count):
                out[first + j * next] = np.uint32(part[j]) << shift


@_compiled
def _total(lanes: Array) -> Any:
    """The sum of LANES sums, which are overwritten."""
    count = LANES // 2
    while count > 0:
        for k in range(count):
            lanes[k] += lanes[count + k]
        count //= 2
    return lanes[0]


@_compiled
def row_norms(X: Array, x_at: int, x_next: int, rows: int, width: int, norms: Array) -> None:
    """Writes the Euclidean norm of every row of X, itself float32 for once; norms float32."""
    lanes = np.empty(LANES, np.float32)
    whole = width // LANES * LANES
    for i in range(rows):
        row = X[x_at + i * x_next :][:width]
        lanes[:] = 0
        for start in range(0, whole, LANES):
            part = row[start : start + LANES]
            for k in range(LANES):
                lanes[k] += part[k] * part[k]
        for k in range(width - whole):
            lanes[k] += row[whole + k] * row[whole + k]
        norms[i] = np.sqrt(_total(lanes))


@_compiled
def join(X: Array, x_at: int, x_next: int, rows: int, width: int, low: Array, out: Array) -> None:
    """Copies rows of bfloat16, with their lower halves `low` (int16, flat), as float32 `out`."""
    for i in range(rows):
        row = X[x_at + i * x_next :][:width]
        half, target = low[i * width :][:width], out[i * width :][:width]
        for j in range(width):
            target[j] = np.uint32(np.uint32(row[j]) << _SIXTEEN) + np.uint32(np.int32(half[j]))


@_compiled
def subtract(
    W: Array, w_at: int, w_next: int, G: Array, g_at: int, g_next: int, rows: int, width: int,
    by_row: Array, by_column: Array, decay: float, largest: int, out: Array,
) -> None:  # fmt: skip
    """Writes W decay - G by_row by_column as float32 bit patterns, [rows, width] flat.

    Finite values stop at `largest`, a bit pattern; what is NaN above it is the one of rounding.py.
    """
    w_shift = np.uint32(16 if W.itemsize == 2 else 0)
    g_shift = np.uint32(16 if G.itemsize == 2 else 0)
    for i in range(rows):
        w_row, g_row = W[w_at + i * w_next :][:width], G[g_at + i * g_next :][:width]
        target, factor = out[i * width :][:width], by_row[i]
        for j in range(width):
            w = np.uint32(np.uint32(w_row[j]) << w_shift).view(np.float32)
            g = np.uint32(np.uint32(g_row[j]) << g_shift).view(np.float32)
            bits = np.float32(w * decay - g * factor * by_column[j]).view(np.uint32)
            magnitude = np.uint32(bits & _MAGNITUDE)
            cut = np.uint32(np.uint32(bits & _SIGN) | largest)
            cut = bits if magnitude == _INFINITY else cut
            cut = _NAN if magnitude > _INFINITY else cut
            target[j] = cut if magnitude > largest else bits


@_compiled
def store_bfloat16(
    exact: Array, added: Array, tie: int, X: Array, x_at: int, x_next: int, rows: int, width: int
) -> None:
    """Stores the upper halves of `exact` + `added` (uint16); both are [rows, width], flat.

    `tie` 1 adds one more where the upper half is odd.
    """
    for i in range(rows):
        bits, more = exact[i * width :][:width], added[i * width :][:width]
        target = X[x_at + i * x_next :][:width]
        for j in range(width):
            odd = np.uint32(np.uint32(bits[j] >> _SIXTEEN) & tie)
            target[j] = np.uint32(np.uint32(bits[j] + np.uint32(more[j])) + odd) >> _SIXTEEN


@_compiled
def round_float16(exact: Array, added: Array) -> None:
    """Rounds `exact` up to a number of float16 with 13 of the 16 bits `added`, in place; flat.

    As `rounding.round_stochastic`, operation by operation.
    """
    for j in range(exact.size):
        bits = exact[j]
        magnitude = np.uint32(bits & _MAGNITUDE)
        # Exponents of the distance between two numbers, and of its inverse.
        unit = np.uint32(max(np.uint32(magnitude >> _MANTISSA), _SMALLEST_HALF) - _TEN)
        quantum = np.uint32(unit << _MANTISSA).view(np.float32)
        inverse = np.uint32(np.uint32(_TWICE_THE_BIAS - unit) << _MANTISSA).view(np.float32)
        fraction = np.float32(np.float32(added[j] >> _THREE) * _OF_13_BITS)
        whole = np.floor(np.float32(np.float32(magnitude.view(np.float32) * inverse) + fraction))
        rounded = np.float32(np.float32(whole) * quantum).view(np.uint32)
        exact[j] = bits if magnitude >= _INFINITY else np.uint32(rounded | (bits & _SIGN))


@_compiled
def channel_sums(
    R: Array, m: Array, v: Array, rank: int, n: int, start: int,
    keep_1: float, take_1: float, keep_2: float, take_2: float,
    correction_1: float, correction_2: float, eps: float, scaled: Array, plain: Array,
) -> None:  # fmt: skip
    """Sums of squares over dimension 0 of R~ and of R, for channels from `start` on.

    R, m and v are [rank, n], flat; the moments stay as they are.
    """
    scaled[:] = 0
    plain[:] = 0
    for i in range(rank):
        at = i * n + start
        r_row, m_row, v_row = R[at:][: plain.size], m[at:][: plain.size], v[at:][: plain.size]
        for j in range(plain.size):
            r = r_row[j]
            first = (m_row[j] * keep_1 + r * take_1) / correction_1
            second = (v_row[j] * keep_2 + take_2 * r * r) / correction_2
            direction = first / (np.sqrt(second) + eps)
            scaled[j] += direction * direction
            plain[j] += r * r


@_compiled
def take_moments(
    R: Array, m: Array, v: Array, keep_1: float, take_1: float, keep_2: float, take_2: float
) -> None:
    """Takes R into both moments; all flat and float32."""
    for j in range(m.size):
        m[j] = m[j] * keep_1 + R[j] * take_1
        v[j] = v[j] * keep_2 + take_2 * R[j] * R[j]


@_compiled
def directions(
    m: Array, v: Array, correction_1: float, correction_2: float, eps: float, out: Array
) -> None:
    """Writes Adam's direction; all flat and float32."""
    for j in range(out.size):
        out[j] = (m[j] / correction_1) / (np.sqrt(v[j] / correction_2) + eps)


@_compiled
def changes(
    before: Array, W: Array, w_at: int, w_next: int, rows: int, width: int
) -> tuple[float, int]:
    """The sum of squares of the change since `before` (flat), and how many elements changed."""
    shift = np.uint32(16 if W.itemsize == 2 else 0)
    lanes, changed = np.zeros(LANES, np.float64), 0
    for i in range(rows):
        row, old = W[w_at + i * w_next :][:width], before[i * width :][:width]
        for start in range(0, width, LANES):
            count = min(LANES, width - start)
            for k in range(count):
                a, b = old[start + k], row[start + k]
                changed += a != b
                x = np.uint32(np.uint32(a) << shift).view(np.float32)
                y = np.uint32(np.uint32(b) << shift).view(np.float32)
                difference = np.float64(y) - np.float64(x)
                lanes[k] += difference * difference
    return _total(lanes), changed

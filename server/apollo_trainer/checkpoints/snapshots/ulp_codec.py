"""The difference of two float tensors in units in the last place, exact for every bit pattern.

Bit patterns get a key that orders them as the numbers are ordered, one key a pattern: NaN payloads,
zeros of both signs and exponent crossings need no case of their own. (The usual sign-magnitude map
gives both zeros one key, and would lose a sign.) The difference of two keys is small where the
numbers are near. What does not fit is marked, and its new pattern kept: an escape.

For 16 bits the key is `u ^ (0xffff if sign else 0x8000)`; here it is the same as a signed number,
the upper bit flipped. Differences wrap around in the key's width, so that they too are exact.

This is the plain reference; ulp_loops.py does the same in compiled loops. What a tensor is stored
as is `encode`: escapes of 2 and 4 bits are themselves differences of NEAR bits, which cost one byte
and not a pattern; what does not even fit there is marked once more, and its new pattern kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SIGNED: dict[int, Any] = {2: np.int16, 4: np.int32}
_UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32}
# Differences by the bits that each one takes: what they are stored as before they are packed.
STORED: dict[int, Any] = {2: np.int8, 4: np.int8, 8: np.int8, 16: np.int16}
NEAR = 8  # bits


def keys(bits: Array) -> Array:
    """Signed keys of unsigned bit patterns (uint16 or uint32), in the same shape.

    It is its own inverse, but for the type: `patterns`.
    """
    signed = bits.view(_SIGNED[bits.itemsize])
    key: Array = np.right_shift(signed, 8 * bits.itemsize - 1)
    np.bitwise_and(key, np.iinfo(signed.dtype).max, out=key)
    np.bitwise_xor(key, signed, out=key)
    return key


def patterns(key: Array) -> Array:
    """The bit patterns, unsigned, that have these signed keys."""
    unsigned = key.view(_UNSIGNED[key.itemsize])
    return keys(unsigned).view(unsigned.dtype)


def difference(old: Array, new: Array, width: int) -> tuple[Array, Array]:
    """What takes `old` to `new`, both uint16 or both uint32, flat.

    Args:
        width: bits of a difference, 2, 4, 8 or 16; it is within +-(2 ** (width - 1) - 1).

    Returns differences (int8, or int16 of 16 bits), those that do not fit marked as
    -(2 ** (width - 1)), and the new patterns of the marked ones, in order.
    """
    steps = keys(new)
    np.subtract(steps, keys(old), out=steps)
    most = 2 ** (width - 1) - 1
    if steps.size and not (-most <= steps.min() and steps.max() <= most):
        unfit = (steps > most) | (steps < -most)
        steps[unfit] = -most - 1
        return steps.astype(STORED[width]), new[unfit]
    return steps.astype(STORED[width]), new[:0]


def apply(old: Array, steps: Array, escapes: Array, width: int, out: Array) -> None:
    """Writes the new patterns; the inverse of `difference`. `out` may be `old`.

    Raises ValueError where there are not as many escapes as marks; `out` is then of no use.
    """
    key = keys(old)
    np.add(key, steps, out=key)
    out[...] = patterns(key)
    # min() is many times faster than a comparison, and most pieces have no mark.
    marked = bool(steps.size) and steps.min() == -(2 ** (width - 1))
    places = np.flatnonzero(steps == -(2 ** (width - 1))) if marked else np.empty(0, np.intp)
    if places.size != escapes.size:
        raise ValueError(f"{places.size} marks, and {escapes.size} escapes")
    out[places] = escapes


def reverse(steps: Array, width: int) -> Array:
    """The differences back; marked ones stay marked, and need the old patterns as escapes."""
    turned = -steps
    turned[steps == -(2 ** (width - 1))] = -(2 ** (width - 1))
    return turned


def packed_size(count: int, width: int) -> int:
    """Bytes that `count` differences take once they are packed."""
    return -(-count * width // 8)


def pack(steps: Array, width: int) -> Array:
    """uint8 [packed_size]: 2 and 4 bits side by side, 16 bits as two planes of bytes."""
    if width == 16:
        return np.ascontiguousarray(steps.view(np.uint8).reshape(-1, 2).T).reshape(-1)
    if width == 8:
        return steps.view(np.uint8)
    bytes_ = steps.view(np.uint8)
    if missing := -bytes_.size % (8 // width):
        bytes_ = np.concatenate([bytes_, np.zeros(missing, np.uint8)])
    words = bytes_.view(_GROUP[width]) & _LOW_BITS[width]
    folded = words.copy()
    for place in range(1, 8 // width):
        folded |= words >> _GROUP[width](place * (8 - width))
    packed: Array = folded.astype(np.uint8)
    return packed


def unpack(packed: Array, count: int, width: int) -> Array:
    """The differences that `pack` was given; `packed` has exactly their bytes."""
    if width == 16:
        return np.ascontiguousarray(packed.reshape(2, -1).T).reshape(-1).view(np.int16)
    if width == 8:
        return packed.view(np.int8)
    return np.take(_TABLES[width], packed).view(np.int8)[:count]


def encode(old: Array, new: Array, width: int) -> tuple[Array, Array, Array]:
    """Packed differences (uint8 [packed_size]), near escapes (int8) and far ones (as `new`).

    There are near ones for widths below NEAR alone; both are in the order of their marks.
    """
    steps, patterns = difference(old, new, width)
    packed = pack(steps, width)
    if width >= NEAR:
        return packed, np.empty(0, np.int8), patterns
    near, far = difference(old[steps == -(2 ** (width - 1))], patterns, NEAR)
    return packed, near, far


def decode(old: Array, packed: Array, near: Array, far: Array, width: int, out: Array) -> None:
    """Writes the new patterns; the inverse of `encode`. `out` may be `old`.

    Raises ValueError where there are not as many escapes as marks; `out` is then of no use.
    """
    steps = unpack(packed, old.size, width)
    if width < NEAR:
        marked = old[steps == -(2 ** (width - 1))]
        if marked.size != near.size:
            raise ValueError(f"{marked.size} marks, and {near.size} escapes")
        apply(marked, near, far, NEAR, marked)
        far = marked
    apply(old, steps, far, width, out)


# As many bytes as there are differences in one packed byte.
_GROUP: dict[int, Any] = {2: np.uint32, 4: np.uint16}
_LOW_BITS = {2: np.uint32(0x03030303), 4: np.uint16(0x0F0F)}


def _table(width: int) -> Array:
    """The differences in each of the 256 packed bytes, as one word of `_GROUP`."""
    places = np.arange(8 // width, dtype=np.uint8) * width
    fields = (np.arange(256, dtype=np.uint8)[:, None] >> places) << (8 - width)
    signed = np.right_shift(fields.astype(np.uint8).view(np.int8), 8 - width)
    words: Array = signed.view(_GROUP[width])[:, 0]
    return words


_TABLES = {width: _table(width) for width in _GROUP}

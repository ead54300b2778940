"""The difference of two float tensors in units in the last place, exact for every bit pattern.

Bit patterns get a key that orders them as the numbers are ordered, one key a pattern: NaN payloads,
zeros of both signs and exponent crossings need no case of their own. (The usual sign-magnitude map
gives both zeros one key, and would lose a sign.) The difference of two keys is small where the
numbers are near. What does not fit is marked, and its new pattern kept: an escape.

For 16 bits the key is `u ^ (0xffff if sign else 0x8000)`; here it is the same as a signed number,
the upper bit flipped. Differences wrap around in the key's width, so that they too are exact.

This is the reference, for few elements and where numba is missing; ulp_loops.py computes the same
in compiled loops. `encode` is the stored form: escapes of 2 and 4 bits are themselves differences
of NEAR bits, which take one byte instead of a pattern; what does not fit there either is marked
once more, and its new pattern kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NEAR = 8  # bits


def keys(bits: Array) -> Array:
    """Signed keys of unsigned bit patterns (uint16 or uint32), in the same shape.

    `patterns` is the inverse: the same, but for the type.
    """
    signed = bits.view(f"i{bits.itemsize}")
    key: Array = np.right_shift(signed, 8 * bits.itemsize - 1)
    np.bitwise_and(key, np.iinfo(signed.dtype).max, out=key)
    np.bitwise_xor(key, signed, out=key)
    return key


def patterns(key: Array) -> Array:
    """The bit patterns, unsigned, that have these signed keys."""
    unsigned = key.view(f"u{key.itemsize}")
    return keys(unsigned).view(unsigned.dtype)


def difference(old: Array, new: Array, width: int) -> tuple[Array, Array]:
    """The differences from `old` to `new`, both uint16 or both uint32, flat; and the escapes.

    Args:
        width: bits of a difference, 2, 4, 8 or 16; it is within +-(2 ** (width - 1) - 1).

    Returns differences (int8; int16 for 16 bits), those that do not fit marked as
    -(2 ** (width - 1)), and the new patterns of the marked ones, in order.
    """
    steps = keys(new)
    np.subtract(steps, keys(old), out=steps)
    most, stored, escapes = 2 ** (width - 1) - 1, f"i{max(1, width // 8)}", new[:0]
    if steps.size and not (-most <= steps.min() and steps.max() <= most):
        unfit = (steps > most) | (steps < -most)
        steps[unfit], escapes = -most - 1, new[unfit]
    return steps.astype(stored), escapes


def apply(old: Array, steps: Array, escapes: Array, width: int, out: Array) -> None:
    """Writes the new patterns; the inverse of `difference`. `out` may be `old`.

    Raises ValueError where there are not as many escapes as marks; `out` is undefined then.
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


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` packed differences."""
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
    """The inverse of `pack`; `packed` has exactly the bytes of `count` differences."""
    if width == 16:
        return np.ascontiguousarray(packed.reshape(2, -1).T).reshape(-1).view(np.int16)
    if width == 8:
        return packed.view(np.int8)
    return np.take(_TABLES[width], packed).view(np.int8)[:count]


def encode(old: Array, new: Array, width: int) -> tuple[Array, Array, Array]:
    """Packed differences (uint8 [packed_size]), near escapes (int8) and far ones (as `new`).

    Only widths below NEAR have near ones; both are in the order of their marks.
    """
    steps, patterns = difference(old, new, width)
    packed = pack(steps, width)
    if width >= NEAR:
        return packed, np.empty(0, np.int8), patterns
    near, far = difference(old[steps == -(2 ** (width - 1))], patterns, NEAR)
    return packed, near, far


def decode(old: Array, packed: Array, near: Array, far: Array, width: int, out: Array) -> None:
    """Writes the new patterns; the inverse of `encode`. `out` may be `old`.

    Raises ValueError where there are not as many escapes as marks; `out` is undefined then.
    """
    steps = unpack(packed, old.size, width)
    if width < NEAR:
        marked = old[steps == -(2 ** (width - 1))]
        if marked.size != near.size:
            raise ValueError(f"{marked.size} marks, and {near.size} escapes")
        apply(marked, near, far, NEAR, marked)
        far = marked
    apply(old, steps, far, width, out)


# Words of as many bytes as there are differences in one packed byte.
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

"""Philox4x32-10, a counter-based generator (Salmon et al., SC 2011), in integer tensor operations.

A draw depends on its key and counter alone. There is no generator state to save, and neither the
device, the number of processes nor the order of the calls changes a bit.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

Domain = Literal["projection", "rounding"]
Key = tuple[int, int]
Words = tuple[Tensor, Tensor, Tensor, Tensor]

MASK32 = 0xFFFFFFFF
ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def derive_key(seed: int, name: str, domain: Domain) -> Key:
    """Returns the key of one parameter: two 32-bit words from a stable hash.

    The domain keeps the projection of a parameter and its rounding draws apart, although both
    count from zero.
    """
    text = f"apollo/{domain}/{seed}/{name}".encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return word & MASK32, word >> 32


def philox(counter: Words, key: Key) -> Words:
    """Returns the four 32-bit words of each counter, as int64 tensors in [0, 2**32).

    The words of `counter` are int64 in [0, 2**32), and broadcast together. A product of two
    32-bit words wraps in int64; its bits are still the right ones.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        # The odd words are only ever combined by xor, so that one mask a round is enough.
        c0 = ((product_1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(MASK32)
        c2 = ((product_0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(MASK32)
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + _WEYL_0) & MASK32, (k1 + _WEYL_1) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


def draw_words(key: Key, step: int, first: int, count: int, device: torch.device) -> Tensor:
    """Returns the words of `count` blocks from block `first` on: int64 [count, 4].

    The counter of a block is its number in words 0 and 1, and `step` in words 2 and 3.
    """
    return _words_of(key, step, torch.arange(first, first + count, device=device))


def _words_of(key: Key, step: int, block: Tensor) -> Tensor:
    """The words of blocks by their numbers, int64 [blocks]: int64 [blocks, 4]."""
    device = block.device
    upper = torch.full((), step, dtype=torch.int64, device=device)
    counter = (block & MASK32, block >> 32, upper & MASK32, upper >> 32)
    return torch.stack(philox(counter, key), dim=-1)


def draw_16_bits(key: Key, step: int, first: int, count: int, device: torch.device) -> Tensor:
    """Returns 16 random bits for elements `first` .. `first + count - 1`: int32 [count].

    Element i takes the 16-bit half i % 8 of block i // 8, low halves first: one call feeds eight
    elements.
    """
    block, skip = first // 8, first % 8
    words = draw_words(key, step, block, (skip + count + 7) // 8, device)
    return _as_16_bits(_halves(words)[skip : skip + count])


def draw_lines(key: Key, step: int, starts: Tensor, width: int) -> Tensor:
    """Returns the bits of `draw_16_bits` for `width` elements from each of `starts` on.

    Args:
        starts: int64 [lines].

    Returns int32 [lines, width].
    """
    counted = torch.arange((width + 14) // 8, device=starts.device)
    words = _words_of(key, step, (starts[:, None] // 8 + counted).flatten())
    places = starts[:, None] % 8 + torch.arange(width, device=starts.device)
    return _as_16_bits(_halves(words).view(len(starts), -1).gather(1, places))


def _halves(words: Tensor) -> Tensor:
    # Little-endian memory, the only one that torch runs on, has the low half first.
    return words.to(torch.int32).view(torch.int16).flatten()


def _as_16_bits(halves: Tensor) -> Tensor:
    return halves.to(torch.int32).bitwise_and_(0xFFFF)

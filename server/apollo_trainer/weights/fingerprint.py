"""A digest of all weights, by which an optimizer state knows the weights that it belongs to.

Sums of integers, so that it is the same on every device and in whatever order it is added up: each
8-byte word is multiplied by an odd key of its place in a block of 65536, and each block's sum by an
odd number of the block's, modulo 2**64. One changed word always changes the digest, and others do
but for one case in 2**64; it is no defence against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from apollo_grpc.region import Region
from apollo_trainer.parallel.parts import NO_REGIONS, Lines
from apollo_trainer.parallel.ranks import ALONE, Ranks

BLOCK_WORDS = 65536
_WORD_BYTES = 8
SAMPLED = 256
# Blocks at a time: what stays in a core's cache, and what keeps a GPU busy within 64 MB.
_BLOCKS = {"cpu": 2, "cuda": 64}
_KEY_STEP, _BLOCK_STEP = 0x1E3779B97F4A7C15, 0x632BE5AB


@torch.no_grad()
def fingerprint(
    parameters: Mapping[str, torch.Tensor],
    regions: Mapping[str, Region] = NO_REGIONS,
    ranks: Ranks = ALONE,
) -> str:
    """The digest, in hexadecimal: of names, dtypes, shapes and bits, in row-major order.

    It is that of the whole parameters, however many ranks hold them; all of them call it.

    Args:
        parameters: each one once.
        regions: of those of which this rank has a part.
    """
    ordered = [(n, t, regions.get(n) or Region.whole_of(t.shape)) for n, t in parameters.items()]
    ordered.sort(key=lambda each: each[0])
    sums = _read([_sum(tensor, region) for _, tensor, region in ordered], ranks)
    digest = hashlib.sha256()
    for (name, tensor, region), value in zip(ordered, sums, strict=True):
        digest.update(f"{name} {tensor.dtype} {region.root} {value}\n".encode())
    return digest.hexdigest()


@torch.no_grad()
def sample(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Some values of each parameter, spread over it: what a load of other weights would change.

    Args:
        parameters: each one once, all on one device.

    Returns bytes on that device, the same for the same values.
    """
    taken = [_spread(tensor.detach()) for _, tensor in sorted(parameters.items())]
    return torch.cat(taken) if taken else torch.empty(0, dtype=torch.uint8)


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """uint8, of at most SAMPLED values in row-major order, whatever the tensor's strides."""
    count = tensor.numel()
    # An odd step meets every column of a matrix whose width is a power of two.
    step = max(1, count // SAMPLED) | 1
    places = torch.arange(0, count, step, device=tensor.device)
    return tensor.take(places).view(torch.uint8)


def _read(sums: list[torch.Tensor], ranks: Ranks) -> list[int]:
    if not sums:
        return []
    # One wait for the device, not one a parameter.
    together = torch.stack(sums)
    ranks.sum(together)
    return together.tolist()


def _sum(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """Of this rank's part: int64, 0-dim, on the tensor's device; wraps around."""
    flat = tensor.detach().contiguous().view(-1)
    if region.whole:
        return _sum_of_all(flat)
    if not region.counted:
        return torch.zeros((), dtype=torch.int64, device=flat.device)
    return _sum_of_lines(flat, Lines.of(region))


def _sum_of_lines(flat: torch.Tensor, lines: Lines) -> torch.Tensor:
    """Each word as if its elements that are not of the line were zero: it is a sum of them."""
    keys, device, in_word = _keys(flat.device), flat.device, _WORD_BYTES // flat.element_size()
    total, first = torch.zeros((), dtype=torch.int64, device=device), 0
    for starts, width in lines.pieces(0, flat.numel()):
        count, begin = len(starts), starts.to(device)[:, None]
        words = -(-(in_word - 1 + width) // in_word)
        padded = flat.new_zeros(count, words * in_word)
        places = begin % in_word + torch.arange(width, device=device)
        padded.scatter_(1, places, flat[first : first + count * width].view(count, width))
        numbers = begin // in_word + torch.arange(words, device=device)
        of_block = numbers // BLOCK_WORDS * _BLOCK_STEP * 2 + 1
        total += (padded.view(torch.int64) * keys[numbers % BLOCK_WORDS] * of_block).sum()
        first += count * width
    return total


def _sum_of_all(flat: torch.Tensor) -> torch.Tensor:
    words = _words(flat)
    keys = _keys(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    chunk = _BLOCKS.get(words.device.type, 1) * BLOCK_WORDS
    for start in range(0, words.numel(), chunk):
        blocks = _blocks(words[start : start + chunk])
        first = start // BLOCK_WORDS
        numbers = torch.arange(first, first + len(blocks), device=words.device)
        total += ((blocks * keys).sum(1) * (numbers * _BLOCK_STEP * 2 + 1)).sum()
    return total


def _words(flat: torch.Tensor) -> torch.Tensor:
    """int64 [words]: the bytes themselves, or a copy with zeros after the last of them."""
    ragged = flat.nbytes % _WORD_BYTES
    # torch views another width only where the tensor begins at a whole word of its storage.
    if not ragged and flat.storage_offset() * flat.element_size() % _WORD_BYTES == 0:
        return flat.view(torch.int64)
    missing = (_WORD_BYTES - ragged) // flat.element_size() if ragged else 0
    padded = flat.new_zeros(flat.numel() + missing)
    padded[: flat.numel()] = flat
    return padded.view(torch.int64)


def _keys(device: torch.device) -> torch.Tensor:
    """int64 [BLOCK_WORDS]: odd, so that a product loses no bit of the word."""
    keys = torch.arange(1, BLOCK_WORDS + 1, dtype=torch.int64, device=device) * _KEY_STEP
    return (keys ^ (keys >> 29)) | 1


def _blocks(words: torch.Tensor) -> torch.Tensor:
    """int64 [blocks, BLOCK_WORDS], the last one filled up with zeros."""
    missing = -words.numel() % BLOCK_WORDS
    filled = torch.nn.functional.pad(words, (0, missing)) if missing else words
    return filled.view(-1, BLOCK_WORDS)

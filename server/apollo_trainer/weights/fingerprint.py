"""A digest of all weights, by which an optimizer state knows the weights that it belongs to.

Sums of integers, so that it is the same on every device and in whatever order it is added up: each
word of a block of 65536 is multiplied by an odd key of its place, the block's sum by one of the
block's. One changed word always changes the digest; it is no defence against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

BLOCK_WORDS = 65536
# Blocks at a time: what fits a core's cache, and what keeps a GPU busy within 64 MB.
_BLOCKS = {"cpu": 4, "cuda": 128}
_KEY_STEP, _BLOCK_STEP = 0x9E3779B1, 0x632BE5AB


@torch.no_grad()
def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """The digest, in hexadecimal: of names, dtypes, shapes and bits, in row-major order.

    Args:
        parameters: of 2 or 4 bytes an element, each one once.
    """
    sums = [(name, tensor, _sum(tensor)) for name, tensor in sorted(parameters.items())]
    digest = hashlib.sha256()
    # One wait for the device, not one a parameter.
    for (name, tensor, _), value in zip(sums, _read([s for _, _, s in sums]), strict=True):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {value}\n".encode())
    return digest.hexdigest()


def _read(sums: list[torch.Tensor]) -> list[int]:
    return torch.stack(sums).tolist() if sums else []


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """int64, 0-dim, on the tensor's device; wraps around."""
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
    keys = _keys(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    chunk = _BLOCKS.get(words.device.type, 1) * BLOCK_WORDS
    for start in range(0, words.numel(), chunk):
        blocks = _blocks(words[start : start + chunk])
        first = start // BLOCK_WORDS
        numbers = torch.arange(first, first + len(blocks), device=words.device)
        total += ((blocks * keys).sum(1) * (numbers * _BLOCK_STEP * 2 + 1)).sum()
    return total


def _keys(device: torch.device) -> torch.Tensor:
    """int32 [BLOCK_WORDS]: odd, so that a product loses no bit of the word."""
    keys = torch.arange(BLOCK_WORDS, dtype=torch.int64, device=device) * _KEY_STEP
    return ((keys ^ (keys >> 15)) & 0x7FFFFFFF | 1).to(torch.int32)


def _blocks(words: torch.Tensor) -> torch.Tensor:
    """int32 [blocks, BLOCK_WORDS], the last one filled up with zeros."""
    missing = -words.numel() % BLOCK_WORDS
    filled = torch.nn.functional.pad(words, (0, missing)) if missing else words
    return filled.view(-1, BLOCK_WORDS).to(torch.int32)

"""Other ways to put the same weights on disk, each as its own documentation has it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

BLOCK = 4096
Weights = dict[str, torch.Tensor]


def with_safetensors(weights: Weights, folder: Path) -> int:
    """One file, in place of the old one; it is not flushed."""
    save_file(weights, folder / "saved.safetensors")
    return (folder / "saved.safetensors").stat().st_size


def with_safetensors_flushed(weights: Weights, folder: Path) -> int:
    """The same with the fsync that a durable file needs."""
    size = with_safetensors(weights, folder)
    _flush(folder / "saved.safetensors")
    return size


def with_torch(weights: Weights, folder: Path) -> int:
    """torch.distributed.checkpoint by one rank; it flushes by default."""
    target = folder / "dcp"
    dcp.save(weights, checkpoint_id=target, no_dist=True)
    return sum(path.stat().st_size for path in target.iterdir())


def with_block_compare(weights: Weights, folder: Path) -> int:
    """Blocks of 4 KB that differ from the file's are written in place, with no journal."""
    path, changed = folder / "blocks.bin", 0
    data = [w.cpu().reshape(-1).view(torch.uint8).numpy() for w in weights.values()]
    if not path.exists():
        path.write_bytes(b"".join(memoryview(d) for d in data))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as old:
        offset = 0
        for tensor in data:
            view = memoryview(tensor)
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                if old[offset + start : offset + start + len(block)] != block:
                    os.pwrite(file.fileno(), block, offset + start)
                    changed += len(block)
            offset += len(view)
        os.fdatasync(file.fileno())
    return changed


def with_save_pretrained(weights: Weights, folder: Path) -> int:
    """transformers' own, of a model whose weights are as many bytes; it does not flush."""
    target = folder / "pretrained"
    device = next(iter(weights.values())).device
    model = _model(sum(w.nbytes for w in weights.values())).to(device)
    model.save_pretrained(target)
    return sum(path.stat().st_size for path in target.glob("*.safetensors"))


_MODELS: dict[int, torch.nn.Module] = {}


def _model(size: int) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if size not in _MODELS:
        layer = 1024 * (2 * 2048 + 2 * 1024 + 3 * 3072) * 2
        _MODELS[size] = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=1024,
                intermediate_size=3072,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
                num_hidden_layers=max(1, size // layer),
                vocab_size=259,
                tie_word_embeddings=True,
            )
        ).bfloat16()
    return _MODELS[size]


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


PEERS: dict[str, Callable[[Weights, Path], int]] = {
    "safetensors.save_file, not durable": with_safetensors,
    "safetensors.save_file and fsync": with_safetensors_flushed,
    "torch.distributed.checkpoint": with_torch,
    "save_pretrained, not durable": with_save_pretrained,
    "block compare in place": with_block_compare,
}

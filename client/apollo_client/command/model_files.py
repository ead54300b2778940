"""The weights' files of a model directory: whether they are all there, and whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

# As vLLM looks for them: a kind is loaded where it is there, whatever lies beside it.
KINDS = (".safetensors", ".bin", ".pt")
_INDEX = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
_LFS = b"version https://git-lfs"
# Larger headers are refused by the format itself.
_MAX_HEADER = 100_000_000
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "tekken.json", "*.tiktoken", "tokenization_*.py")


def weight_files(model: Path) -> list[Path]:
    """The files of the first kind that is there; empty where none is."""
    for kind in KINDS:
        if found := sorted(path for path in model.iterdir() if path.suffix == kind):
            return found
    return []


def what_is_missing(model: Path) -> str:
    """What of the weights is not there or not whole, to follow the model's name; empty if nothing.

    Raises OSError, and ValueError for an index that is no JSON.
    """
    if not (files := weight_files(model)):
        return "has no weights: no file *.safetensors, *.bin or *.pt"
    named = _named_by_index(model, files[0].suffix)
    wanting = [name for name in named if not (model / name).is_file()]
    if wanting:
        more = f" (and {len(wanting) - 1} more)" if wanting[1:] else ""
        return f"lacks {wanting[0]}{more}, which its index names"
    return next((said for path in files if (said := _not_whole(path))), "")


def has_tokenizer(model: Path) -> bool:
    """Whether any file of a tokenizer's is there."""
    return any(any(model.glob(pattern)) for pattern in _TOKENIZERS)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises OSError, and ValueError in words that follow the model's name."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has {path.name}, which is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"has {path.name}, which is no JSON object")
    return found


def _named_by_index(model: Path, kind: str) -> list[str]:
    index = model / _INDEX.get(kind, "")
    if not index.is_file():
        return []
    named = read_object(index).get("weight_map")
    return sorted(set(map(str, named.values()))) if isinstance(named, dict) else []


def _not_whole(path: Path) -> str:
    """What is wrong with a weights' file, as far as its beginning and its length tell."""
    if not path.is_file():
        return f"lacks {path.name}: it is a link to nothing"
    with path.open("rb") as file:
        begins, size = file.read(len(_LFS)), path.stat().st_size
        if begins == _LFS:
            return f"has of {path.name} a pointer of Git LFS alone: run 'git lfs pull' there"
        if not size:
            return f"has {path.name}, which is empty"
        if path.suffix == ".safetensors" and size != _told_size(file):
            return f"has {path.name}, which is cut off or damaged: {size:,} bytes are there"
    return ""


def _told_size(file: BinaryIO) -> int | None:
    """Bytes of a safetensors file as its header tells; None where that cannot be read."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        return None
    try:
        header: dict[str, Any] = json.loads(file.read(length))
        ends = [row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"]
        return 8 + length + int(max(ends, default=0))
    except (ValueError, TypeError, AttributeError, LookupError):
        return None

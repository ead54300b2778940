"""Compares mapped weights with the model directory: is this what vLLM loaded?

The map is proved by arithmetic; this finds a loader that changed values, a layout that changed
after the load, and a directory that is not the one that was loaded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from apollo_trainer.weights.checkpoint_reader import CheckpointReader, same_bytes
from apollo_trainer.weights.loaded_files import loaded_shards
from apollo_trainer.weights.manifest import refusal

BLOCKS = 6  # of each tensor, unless all of it is compared: both ends, and some between
BLOCK_ELEMENTS = 4096
SEED = 20412
MAX_NAMED = 3


def require_checkpoint_values(directory: Path, reader: CheckpointReader, everything: bool) -> int:
    """Compares live weights with the directory's safetensors; returns the elements compared.

    A tensor of another dtype on disk is converted first, as vLLM does when it loads. Other formats
    than safetensors are not read: they would be unpickled.

    Args:
        everything: compare every element instead of seeded blocks of each tensor.

    Raises FailedPrecondition that names the tensor which differs, or which no file holds.
    """
    compared, names = 0, set[str]()
    for shard in _loaded(directory):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    compared += _require_equal(file, shard.name, name, reader, everything)
                    names.add(name)
        except (SafetensorError, OSError) as error:
            raise refusal(
                "CHECKPOINT_UNREADABLE", f"{shard.name} of the model directory: {error}."
            ) from error
    _require_all(directory, reader.missing_from(names))
    return compared


def _loaded(directory: Path) -> list[Path]:
    """Other files lie there as they were, whatever was trained and synced since."""
    try:
        return loaded_shards(directory)
    except (ValueError, OSError) as error:
        raise refusal("CHECKPOINT_UNREADABLE", f"The model directory: {error}.") from error


def _require_all(directory: Path, missing: list[str]) -> None:
    """What was compared with nothing may be anything."""
    if not missing:
        return
    named = ", ".join(missing[:MAX_NAMED]) + (" and others" if missing[MAX_NAMED:] else "")
    raise refusal(
        "VALUES_NOT_COMPARED",
        f"No safetensors file of {directory} holds {named} by that name, so that it is not known "
        "whether vLLM loaded its weights from there. Serve a directory as transformers saves it "
        "(save_pretrained), or start the training server with --no-check-values if you know that "
        "they are its weights.",
    )


def _require_equal(
    file: Any, shard: str, name: str, reader: CheckpointReader, everything: bool
) -> int:
    live = reader.read(name)
    if live is None:
        return 0
    on_disk = file.get_slice(name)
    if tuple(on_disk.get_shape()) != tuple(live.shape):
        raise _differs(name, shard, f"has the shape {on_disk.get_shape()} there")
    compared = 0
    for block in [...] if everything else _blocks(name, tuple(live.shape)):
        ours, theirs = live[block].cpu(), on_disk[block].to(live.dtype)
        if not same_bytes(ours, theirs):
            raise _differs(name, shard, "holds other values there")
        compared += ours.numel()
    return compared


def _differs(name: str, shard: str, how: str) -> Exception:
    return refusal(
        "VALUES_DIFFER",
        f"The checkpoint tensor {name} ({shard}) {how} than where vLLM's weights were mapped. "
        "Either the directory changed after vLLM loaded it (restart vLLM), or vLLM keeps this "
        "weight in a form that cannot be trained.",
    )


def _blocks(name: str, shape: tuple[int, ...]) -> Iterator[Any]:
    """Indices of the first and the last block of a tensor, and of seeded ones between."""
    if not shape:
        yield ...
        return
    width = 1
    for side in shape[1:]:
        width *= side
    rows = max(1, BLOCK_ELEMENTS // max(1, width))
    last = max(0, shape[0] - rows)
    draw = random.Random(f"{SEED}/{name}")
    starts = {0, last} | {draw.randint(0, last) for _ in range(BLOCKS - 2)}
    for start in sorted(starts):
        yield slice(start, start + rows)

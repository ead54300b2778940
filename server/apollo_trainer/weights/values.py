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
from apollo_trainer.weights.directory_names import held_names
from apollo_trainer.weights.loaded_files import loaded_shards
from apollo_trainer.weights.manifest import named, refusal

BLOCKS = 6  # of each tensor, unless all of it is compared: both ends, and some between
BLOCK_ELEMENTS = 4096
PIECE_ELEMENTS = 1 << 24  # of a tensor that is compared as a whole: 32 MB in 16 bits
SEED = 20412
# Weights that are not read: an unpickled one could run what it likes, and GGUF is quantised.
_UNREAD = (".bin", ".pt", ".pth", ".ckpt", ".gguf")


def require_checkpoint_values(directory: Path, reader: CheckpointReader, everything: bool) -> int:
    """Compares live weights with the directory's safetensors; returns the elements compared.

    A tensor of another dtype on disk is converted first, as vLLM does when it loads. Other formats
    than safetensors are not read.

    Args:
        everything: compare every element instead of seeded blocks of each tensor; of a tied weight
            that the files hold twice they are compared anyway.

    Raises Refusal of the tensors that differ, or that no file holds.
    """
    compared, found = 0, dict[str, str]()
    held = held_names(directory)
    for shard in _loaded(directory):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    # A head that was trained apart differs in as few rows as it saw tokens.
                    whole = everything or not held.isdisjoint(reader.tied_to(name))
                    elements, how = _compare(file, name, reader, whole)
                    found[name] = f"{how} in {shard.name}" if how else ""
                    compared += elements
        except (SafetensorError, OSError) as error:
            raise refusal(
                "CHECKPOINT_UNREADABLE", f"{shard.name} of the model directory: {error}."
            ) from error
    _require_none_differ(found, reader)
    _require_all(directory, reader.missing_from(set(found)))
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
    unread = sorted(path.name for path in directory.iterdir() if path.suffix in _UNREAD)
    others = f" (it has {named(unread)}, which {_is_or_are(unread)} not read)" if unread else ""
    raise refusal(
        "VALUES_NOT_COMPARED",
        f"No safetensors file of {directory}{others} holds {named(missing)}, so that it is not "
        "known whether vLLM loaded its weights from there. Serve a directory as transformers "
        "saves it (save_pretrained), or start the training server with --no-check-values "
        "(APOLLO_CHECK_VALUES=false) if you know that they are its weights: a sync is refused "
        "then, and `apollo checkpoint export FOLDER` writes what was learned as safetensors.",
        dict.fromkeys(missing, "no safetensors file holds it by that name"),
    )


def _is_or_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _compare(file: Any, name: str, reader: CheckpointReader, everything: bool) -> tuple[int, str]:
    """Elements that were compared, and what is wrong with the tensor; empty where nothing is."""
    live = reader.read(name)
    if live is None:
        return 0, ""
    on_disk, compared = file.get_slice(name), 0
    if tuple(on_disk.get_shape()) != tuple(live.shape):
        return 0, f"has the shape {on_disk.get_shape()}"
    for block in _blocks(name, tuple(live.shape), everything):
        ours, theirs = live[block].cpu(), on_disk[block].to(live.dtype)
        if not same_bytes(ours, theirs):
            return compared, "holds other values"
        compared += ours.numel()
    return compared, ""


def _require_none_differ(found: dict[str, str], reader: CheckpointReader) -> None:
    """Args: found: each tensor of the files, and what is wrong with it."""
    differing = {name: how for name, how in found.items() if how}
    if not differing:
        return
    same = found.keys() - differing.keys()
    for name in differing if len(differing) == 1 else ():
        if twins := same & reader.tied_to(name):
            raise _untied(name, min(twins), differing)
    raise refusal(
        "VALUES_DIFFER",
        f"{len(differing)} of {len(found)} tensors of the model directory are not what vLLM's "
        f"weights were mapped as: {named([f'{name} ({how})' for name, how in differing.items()])}. "
        "Either the directory changed after vLLM loaded it (restart vLLM), or vLLM keeps these "
        "weights in a form that cannot be trained.",
        differing,
    )


def _untied(name: str, served: str, differing: dict[str, str]) -> Exception:
    return refusal(
        "TIED_WEIGHTS_DIFFER",
        f"config.json ties {name} to {served} (tie_word_embeddings), but the files hold other "
        f"values for it, which vLLM does not serve. Set that to false if {name} is a weight of its "
        "own, or else take it out of the files; then restart vLLM.",
        differing,
    )


def _blocks(name: str, shape: tuple[int, ...], everything: bool) -> Iterator[Any]:
    """Indices of a tensor's first and last block, and of seeded ones between, or of all of it."""
    if not shape:
        yield ...
        return
    width = 1
    for side in shape[1:]:
        width *= side
    rows = max(1, (PIECE_ELEMENTS if everything else BLOCK_ELEMENTS) // max(1, width))
    last = max(0, shape[0] - rows)
    draw = random.Random(f"{SEED}/{name}")
    starts = {0, last} | {draw.randint(0, last) for _ in range(BLOCKS - 2)}
    for start in range(0, shape[0], rows) if everything else sorted(starts):
        yield slice(start, start + rows)

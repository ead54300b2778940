"""Sync, first version: new shards are written beside the old ones, then renamed over them.

All new shards are on disk before the first rename, so a full disk or a crash while writing leaves
the directory as it was. A crash between two renames can leave shards of two generations; with one
shard it cannot.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.durable_write import flush_file, flush_folder, new_file_beside
from apollo_trainer.checkpoints.tensor_file import write_tensors
from apollo_trainer.weights.checkpoint_reader import CheckpointReader, same_bytes

Progress = Callable[[int, int, str], None]


@dataclass
class SyncOutcome:
    """What a sync did; bytes of tensors compared and of files written."""

    bytes_compared: int = 0
    bytes_written: int = 0
    tensors_changed: int = 0
    files_written: list[str] = field(default_factory=list)


def sync_directory(
    directory: Path, reader: CheckpointReader, progress: Progress = lambda *_: None
) -> SyncOutcome:
    """Brings the directory's safetensors up to date with the live weights.

    The weights must not change meanwhile. Files without a changed tensor are not written. Tensors
    that belong to no parameter are kept as they are.

    Raises FailedPrecondition for a directory that cannot be synced, OSError when the disk refuses;
    in both cases the old files are kept.
    """
    shards = _require_shards(directory, reader)
    outcome, total = SyncOutcome(), sum(shard.stat().st_size for shard in shards)
    with ExitStack() as new_files:
        renames: list[tuple[Path, Path]] = []
        for shard in shards:
            progress(outcome.bytes_compared, total, shard.name)
            tensors, changed = _live_shard(shard, reader, outcome)
            if changed:
                new = new_files.enter_context(new_file_beside(shard))
                _write_shard(shard, new, tensors)
                renames.append((new, shard))
            outcome.tensors_changed += changed
        for new, shard in renames:
            outcome.bytes_written += new.stat().st_size
            outcome.files_written.append(shard.name)
            new.replace(shard)
    if renames:
        flush_folder(directory)
    progress(total, total, "")
    return outcome


def _require_shards(directory: Path, reader: CheckpointReader) -> list[Path]:
    if not directory.is_dir():
        raise FailedPrecondition(
            f"vLLM serves {directory}, which is no local directory; nothing was written. Serve a "
            "local copy of the model to sync it.",
            reason="NOT_A_DIRECTORY",
        )
    shards = sorted(directory.glob("*.safetensors"))
    names: set[str] = set()
    for shard in shards:
        if shard.is_symlink() or shard.stat().st_nlink > 1:
            raise FailedPrecondition(
                f"{shard.name} is a link: other directories share its bytes, and a sync would "
                "change or split them. Nothing was written. Serve a private copy of the model.",
                reason="SHARD_IS_LINKED",
            )
        with safe_open(shard, framework="pt") as file:
            names |= set(file.keys())
    if missing := reader.missing_from(names):
        raise FailedPrecondition(
            f"The directory's safetensors do not hold {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + "; nothing was written.",
            reason="CHECKPOINT_INCOMPLETE",
        )
    return shards


def _live_shard(
    shard: Path, reader: CheckpointReader, outcome: SyncOutcome
) -> tuple[dict[str, torch.Tensor], int]:
    """The shard's tensors with live values, and how many differ from the file's bytes."""
    tensors, changed = {}, 0
    with safe_open(shard, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            on_disk = file.get_tensor(name)
            live = reader.read(name)
            live = live if live is None else live.cpu()
            tensors[name] = on_disk if live is None else live
            if live is not None:
                outcome.bytes_compared += live.numel() * live.element_size()
                changed += not same_bytes(on_disk, live)
    return tensors, changed


def _write_shard(old: Path, new: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(old, framework="pt") as file:
        metadata = file.metadata()
    # safetensors refuses tensors of one storage, and live views all share the engine's buffer.
    write_tensors({name: t.clone() for name, t in tensors.items()}, new, metadata)
    shutil.copymode(old, new)
    flush_file(new)

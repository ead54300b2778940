"""The live weights as a new model directory that anything of Hugging Face's loads."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from apollo_grpc.errors import AlreadyExists, DataLoss, FailedPrecondition
from apollo_trainer.checkpoints.durable_write import flush_file, flush_folder
from apollo_trainer.checkpoints.no_replace import rename_without_replacing
from apollo_trainer.checkpoints.store_folder import flush_tree
from apollo_trainer.checkpoints.survey import Progress
from apollo_trainer.checkpoints.tensor_file import write_tensors
from apollo_trainer.weights.checkpoint_reader import CheckpointReader, same_bytes

SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_INDEXES = tuple(f"{ending}.index.json" for ending in _WEIGHTS)
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class Exported:
    """What an export wrote: bytes of the tensors, and the weight files by name."""

    bytes_written: int
    files: tuple[str, ...]


def export_directory(
    source: Path,
    target: Path,
    reader: CheckpointReader,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda *_: None,
) -> Exported:
    """Writes a new model directory; the weights must not change meanwhile.

    It holds the tensors that the source's files hold, of their shapes: tied weights as they are
    there, and no rows that an engine adds to the vocabulary. Everything is read back and compared
    before the directory gets its name.

    Raises AlreadyExists, FailedPrecondition where the source cannot be exported, DataLoss where the
    disk gives back something else, OSError when it refuses; nothing is left of it then.
    """
    if target.is_symlink() or target.exists():
        raise _exists(target)
    shapes = _planned(source, reader)
    building = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:12]}")
    building.mkdir()
    try:
        _copy_others(source, building)
        exported = _write_shards(source, building, reader, shapes, shard_bytes, progress)
        flush_tree(building)
        progress(exported.bytes_written, exported.bytes_written, target.name)
        try:
            rename_without_replacing(building, target)
        except FileExistsError as error:
            raise _exists(target) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    flush_folder(target.parent)
    progress(exported.bytes_written, exported.bytes_written, "")
    return exported


def _exists(target: Path) -> AlreadyExists:
    return AlreadyExists(
        f"{target} exists; nothing was written. Choose a directory that does not exist.",
        reason="EXPORT_EXISTS",
    )


def _planned(source: Path, reader: CheckpointReader) -> dict[str, torch.Tensor]:
    """The source's tensors, on the meta device, with the live dtypes."""
    planned: dict[str, torch.Tensor] = {}
    for shard in _shards(source):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                live = reader.outline(name)
                planned[name] = file.get_tensor(name).to("meta") if live is None else live
                if list(planned[name].shape) != file.get_slice(name).get_shape():
                    raise FailedPrecondition(
                        f"The live {name} is {list(planned[name].shape)}, which is not its shape "
                        f"in {shard.name}; nothing was written.",
                        reason="CHECKPOINT_INCOMPATIBLE",
                    )
    if missing := reader.missing_from(set(planned)):
        raise FailedPrecondition(
            f"The directory's safetensors do not hold {missing[0]}; nothing was written.",
            reason="CHECKPOINT_INCOMPLETE",
        )
    return planned


def _shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def _read(source: Path, shard: Path, name: str, reader: CheckpointReader) -> torch.Tensor:
    """The live values, or those of the file where no parameter has the name."""
    live = reader.read(name)
    if live is not None:
        return live.cpu()
    with safe_open(shard, framework="pt") as file:
        values: torch.Tensor = file.get_tensor(name)
        return values


def _copy_others(source: Path, building: Path) -> None:
    """Copies config, tokenizer and the like: the files themselves, never links to them."""
    for path in sorted(source.iterdir()):
        if path.is_dir():
            if path.name in _FOLDERS:
                shutil.copytree(path, building / path.name)
        elif not path.name.startswith(".") and not path.name.endswith((*_WEIGHTS, *_INDEXES)):
            shutil.copyfile(path, building / path.name)


def _write_shards(
    source: Path,
    building: Path,
    reader: CheckpointReader,
    planned: dict[str, torch.Tensor],
    shard_bytes: int,
    progress: Progress,
) -> Exported:
    split = split_torch_state_dict_into_shards(
        planned, filename_pattern=_PATTERN, max_shard_size=shard_bytes
    )
    holder = {name: shard for shard in _shards(source) for name in _names(shard)}
    done, total = 0, sum(t.nbytes for t in planned.values())
    for filename, names in split.filename_to_tensors.items():
        progress(done, total, filename)
        read = {name: _read(source, holder[name], name, reader) for name in names}
        write_tensors(read, building / filename, _META)
        flush_file(building / filename)
        _compare(building / filename, read)
        done += sum(t.nbytes for t in read.values())
    if split.is_sharded:
        index: dict[str, Any] = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        (building / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return Exported(total, tuple(split.filename_to_tensors))


_META = {"format": "pt"}


def _names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def _compare(path: Path, written: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        for name, values in written.items():
            if not same_bytes(file.get_tensor(name), values):
                raise DataLoss(
                    f"{path.name} gives back another {name} than was written; the export was "
                    "removed. Check the disk.",
                    reason="EXPORT_CORRUPT",
                )

"""The live weights as a new model directory that anything of Hugging Face's loads."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from apollo_grpc.errors import AlreadyExists, DataLoss
from apollo_trainer.checkpoints.directory.disk_values import bytes_to_write
from apollo_trainer.checkpoints.directory.loaded_files import loaded_files
from apollo_trainer.checkpoints.directory.preconditions import missing_from, read_headers
from apollo_trainer.checkpoints.directory.state_folder import Place, place_of
from apollo_trainer.checkpoints.directory.survey import Progress
from apollo_trainer.checkpoints.disk import (
    DTYPES,
    FILES,
    FileOps,
    ShardHeader,
    TensorPlace,
    bytes_of,
    copy_file,
    digest_at,
    digest_of,
    flush_file,
    flush_folders,
    new_folder_beside,
    pieces_of,
    read_header,
    write_new,
    write_tensors,
)
from apollo_trainer.checkpoints.host_memory import Staging
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.loaded_files import INDEX

SHARD_BYTES = 5 * 10**9
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
    ops: FileOps = FILES,
    state: Path | None = None,
) -> Exported:
    """Writes a new model directory; the weights must not change meanwhile.

    It holds the tensors of the source's files that are loaded, each once, of their dtypes and
    shapes: tied weights as they are there, no rows that an engine adds to the vocabulary, and
    values that training did not touch bit for bit. What those files lack is written as it is
    served. Everything is read back and compared before the directory gets its name.

    Args:
        state: the source's state folder; None for the one beside it.

    Raises AlreadyExists, FailedPrecondition where the source cannot be exported, DataLoss where the
    disk gives back something else, OSError when it refuses; nothing is left of it then. What a
    process that was killed left beside `target`, the next export removes.
    """
    if ops.found(target):
        raise _exists(target)
    values = _Values(place_of(source, ops, state), reader)
    with new_folder_beside(target, ops) as building:
        _copy_others(ops, values.place.directory, building)
        if ops.found(values.place.aside):
            # Of a sync that was cut off.
            copy_file(ops, values.place.aside, building / "config.json")
        exported = _write_shards(values, building, shard_bytes, progress)
        flush_folders(ops, building)
        progress(exported.bytes_written, exported.bytes_written, target.name)
        try:
            ops.rename_new(building, target)
        except FileExistsError as error:
            raise _exists(target) from error
    ops.sync_folder(target.parent)
    progress(exported.bytes_written, exported.bytes_written, "")
    return exported


def _exists(target: Path) -> AlreadyExists:
    return AlreadyExists(
        f"{target} exists; nothing was written. Choose a directory that does not exist.",
        reason="EXPORT_EXISTS",
    )


class _Values:
    """The tensors by name: where each lies in the source, and the bytes that it is to have.

    Those of the live model that lie nowhere have no other dtype and values than the live ones.
    """

    def __init__(self, place: Place, reader: CheckpointReader):
        self.place, self._reader, self._staging = place, reader, Staging()
        self._at = dict[str, tuple[Path, TensorPlace, Path | None]]()
        headers = _headers(place, reader)
        for shard, header in headers.items():
            path = (place.directory / shard).resolve()
            earlier = place.earlier(shard, digest_of(header.raw))
            for name, at in header.tensors.items():
                self._at.setdefault(name, (path, at, earlier))
        self._nowhere = missing_from(headers, reader)

    def outlines(self) -> dict[str, torch.Tensor]:
        """Dtypes and shapes, as tensors without values."""
        found = {name: self._reader.outline(name) for name in self._nowhere}
        return {name: outline for name, outline in found.items() if outline is not None} | {
            name: torch.empty(at.shape, dtype=DTYPES[at.dtype], device="meta")
            for name, (_, at, _) in self._at.items()
        }

    def pieces(self, name: str) -> Iterator[memoryview]:
        """As `bytes_to_write`."""
        live = self._reader.read(name)
        staged = None if live is None else self._staging(live)
        if name in self._at:
            path, at, earlier = self._at[name]
            return bytes_to_write(self.place.ops, path, at, staged, earlier)
        assert staged is not None
        return pieces_of(bytes_of(staged))


def _headers(place: Place, reader: CheckpointReader) -> dict[str, ShardHeader]:
    """Of the files that vLLM loads, or of those of transformers where they hold more of it.

    None where neither hold a live tensor: by names of their own, they hold it as it was.
    """
    files = loaded_files(place.ops, place.directory)
    choices = (files.by_vllm, files.by_transformers)
    headers = [read_headers(place, names, reader) for names in choices]
    best = min(headers, key=lambda found: len(missing_from(found, reader)))
    return best if len(missing_from(best, reader)) < len(missing_from({}, reader)) else {}


def _copy_others(ops: FileOps, source: Path, building: Path) -> None:
    """Copies config, tokenizer and the like: the files themselves, never links to them."""
    for name in ops.names(source):
        if stat.S_ISDIR(ops.stat((source / name).resolve()).st_mode):
            if name in _FOLDERS:
                ops.mkdir(building / name, 0o755)
                _copy_others(ops, (source / name).resolve(), building / name)
        elif not name.startswith(".") and not name.endswith((*_WEIGHTS, *_INDEXES)):
            copy_file(ops, source / name, building / name)


def _write_shards(
    values: _Values, building: Path, shard_bytes: int, progress: Progress
) -> Exported:
    ops, outlines = values.place.ops, values.outlines()
    split = split_torch_state_dict_into_shards(
        outlines, filename_pattern=_PATTERN, max_shard_size=shard_bytes
    )
    done, total = 0, sum(t.nbytes for t in outlines.values())
    for filename, names in split.filename_to_tensors.items():
        progress(done, total, filename)
        part = {name: outlines[name] for name in names}
        digests = write_tensors(part, building / filename, _META, ops, values.pieces)
        flush_file(building / filename, ops)
        _compare(ops, building / filename, digests)
        done += sum(t.nbytes for t in part.values())
    if split.is_sharded:
        index: dict[str, Any] = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        write_new(building / INDEX, json.dumps(index, indent=2).encode() + b"\n", ops, 0o666)
    return Exported(total, tuple(split.filename_to_tensors))


_META = {"format": "pt"}


def _compare(ops: FileOps, path: Path, digests: dict[str, str]) -> None:
    header = read_header(ops, path)
    with ops.opened(path) as file:
        for name, at in header.tensors.items():
            if digest_at(ops, file, at) != digests[name]:
                raise DataLoss(
                    f"{path.name} gives back another {name} than was written; the export was "
                    "removed. Check the disk.",
                    reason="EXPORT_CORRUPT",
                )

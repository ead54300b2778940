"""Export: the live weights as a new model directory that Hugging Face's libraries load."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards

from apollo_grpc.errors import AlreadyExists, DataLoss, Resource
from apollo_trainer.checkpoints.directory.disk_values import bytes_to_write
from apollo_trainer.checkpoints.directory.loaded_files import loaded_files
from apollo_trainer.checkpoints.directory.new_directory import copy_file, new_directory
from apollo_trainer.checkpoints.directory.preconditions import missing_from, read_headers
from apollo_trainer.checkpoints.directory.state_folder import Place, place_of
from apollo_trainer.checkpoints.directory.survey import Progress
from apollo_trainer.checkpoints.disk import (
    FILES,
    FileOps,
    ShardHeader,
    TensorPlace,
    digest_at,
    flush_file,
    pieces_of,
    read_header,
    write_new,
    write_tensors,
)
from apollo_trainer.checkpoints.host_memory import Staging
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.loaded_files import INDEX

SHARD_BYTES = 5 * 10**9
_PATTERN, _METADATA = "model{suffix}.safetensors", {"format": "pt"}
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

    Each tensor of the source's loaded files is written once, with its dtype and shape there: no
    rows that an engine adds to the vocabulary, and untrained values bit for bit. Live tensors that
    those files lack are written as they are served. Everything is read back and compared before
    the directory gets its name.

    Args:
        state: the source's state folder; None for the one beside it.

    Raises AlreadyExists, FailedPrecondition where the source cannot be exported, DataLoss where the
    disk gives back something else, OSError when it refuses; nothing of the export is left then. The
    next export removes what a killed process left beside `target`.
    """
    taken = AlreadyExists(
        f"{target} exists; nothing was written. Choose a directory that does not exist.",
        reason="EXPORT_EXISTS",
        resource=Resource("directory", str(target)),
    )
    if ops.found(target):
        raise taken
    values = _Values(place_of(source, ops, state), reader)
    total = sum(outline.nbytes for outline in values.outlines.values())
    with new_directory(target, ops, taken, lambda: progress(total, total, target.name)) as folder:
        _copy_others(ops, values.place.directory, folder)
        if ops.found(values.place.aside):
            # Of a sync that was cut off.
            copy_file(ops, values.place.aside, folder / "config.json")
        files = _write_shards(values, folder, shard_bytes, progress)
    progress(total, total, "")
    return Exported(total, files)


class _Values:
    """The tensors to export: where each lies in the source, and the bytes that it is to have.

    A live tensor that no file holds has the live dtype and the live values.

    Attributes:
        outlines: dtype and shape of each, as a tensor without values.
    """

    def __init__(self, place: Place, reader: CheckpointReader):
        self.place, self._reader, self._staging = place, reader, Staging()
        self._at = dict[str, tuple[Path, TensorPlace, Path | None]]()
        headers = _headers(place, reader)
        for shard, header in headers.items():
            path = (place.directory / shard).resolve()
            earlier = place.earlier(shard, header.digest)
            for name, at in header.tensors.items():
                self._at.setdefault(name, (path, at, earlier))
        nowhere = {name: reader.outline(name) for name in missing_from(headers, reader)}
        self.outlines = {name: live for name, live in nowhere.items() if live is not None}
        self.outlines |= {name: at.outline() for name, (_, at, _) in self._at.items()}

    def pieces(self, name: str) -> Iterator[memoryview]:
        """As `bytes_to_write`."""
        live = self._reader.read(name)
        staged = None if live is None else self._staging(live)
        if name in self._at:
            path, at, earlier = self._at[name]
            return bytes_to_write(self.place.ops, path, at, staged, earlier)
        assert staged is not None
        return pieces_of(staged)


def _headers(place: Place, reader: CheckpointReader) -> dict[str, ShardHeader]:
    """Headers of the files that vLLM loads, or that transformers loads where they hold more.

    Empty where no file holds a live tensor: its tensors have other names and older values.
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
    values: _Values, folder: Path, shard_bytes: int, progress: Progress
) -> tuple[str, ...]:
    """Writes the shards, and an index of several; returns the shards' names."""
    ops, outlines = values.place.ops, values.outlines
    split = split_torch_state_dict_into_shards(
        outlines, filename_pattern=_PATTERN, max_shard_size=shard_bytes
    )
    done, total = 0, sum(outline.nbytes for outline in outlines.values())
    for file, names in split.filename_to_tensors.items():
        progress(done, total, file)
        part = {name: outlines[name] for name in names}
        digests = write_tensors(part, folder / file, _METADATA, ops, values.pieces)
        flush_file(folder / file, ops)
        _compare(ops, folder / file, digests)
        done += sum(outline.nbytes for outline in part.values())
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_new(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n", ops, 0o666)
    return tuple(split.filename_to_tensors)


def _compare(ops: FileOps, path: Path, digests: dict[str, str]) -> None:
    """Reads a file back. Raises DataLoss where a tensor is not what was written."""
    header = read_header(ops, path)
    with ops.opened(path) as file:
        for name, at in header.tensors.items():
            if digest_at(ops, file, at) != digests[name]:
                raise DataLoss(
                    f"{path.name} gives back another {name} than was written; the export was "
                    "removed. Check the disk.",
                    reason="EXPORT_CORRUPT",
                )

"""Which files of a model directory are loaded, and which tensors stand in two of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.disk import FileOps, read_header
from apollo_trainer.weights.loaded_files import LoadedFiles, choose_files


@dataclass(frozen=True)
class Twin:
    """A tensor that stands in two loaded files; `file` is the one that vLLM loads."""

    tensor: str
    file: str
    other: str
    why: str


def loaded_files(ops: FileOps, directory: Path) -> LoadedFiles:
    """What vLLM and transformers load. Raises FailedPrecondition for a wrong index, and OSError."""
    try:
        # Of a hub cache the index is a link.
        return choose_files(
            ops.names(directory), lambda name: ops.read((directory / name).resolve())
        )
    except ValueError as error:
        raise FailedPrecondition(
            f"{error}: nobody loads the directory with it. Nothing was written. Bring it back from "
            "a copy, then try again.",
            reason="INDEX_UNREADABLE",
        ) from error


def twins(ops: FileOps, directory: Path, files: LoadedFiles) -> Iterator[Twin]:
    """Tensors that stand in two loaded files. Skips files that cannot be parsed. Raises OSError."""
    file_of = dict[str, str]()
    others = [file for file in files.by_either if file not in files.by_vllm]
    for file in (*files.by_vllm, *others):
        why = "vLLM loads both, one over the other"
        if file in others:
            why = "vLLM loads the former, and transformers the latter"
        for name in _tensors(ops, directory / file):
            if name in file_of:
                yield Twin(name, file_of[name], file, why)
            elif file not in others:
                file_of[name] = file


def _tensors(ops: FileOps, path: Path) -> list[str]:
    try:
        return list(read_header(ops, path.resolve()).tensors)
    except ValueError:
        return []

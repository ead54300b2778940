"""The files of a model directory that are loaded, and tensors that stand in two of them."""

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
    """The files. Raises FailedPrecondition where an index is none, or names files that are none."""
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
    """Tensors of which it is not sure what is loaded. Raises OSError; what is no file has none."""
    file_of = dict[str, str]()
    for file in files.by_vllm:
        for name in _tensors(ops, directory / file):
            if name in file_of:
                why = "vLLM loads both, one over the other"
                yield Twin(name, file_of[name], file, why)
            file_of.setdefault(name, file)
    for file in (name for name in files.by_either if name not in files.by_vllm):
        for name in _tensors(ops, directory / file):
            if name in file_of:
                why = "vLLM loads the former, and transformers the latter"
                yield Twin(name, file_of[name], file, why)


def refuse_twins(ops: FileOps, directory: Path, files: LoadedFiles) -> None:
    """Raises FailedPrecondition where a tensor stands in two files that are loaded."""
    if found := next(twins(ops, directory, files), None):
        raise FailedPrecondition(
            f"{found.tensor} stands in {found.file} and in {found.other}: {found.why}. Nothing was "
            "written. `apollo checkpoint export FOLDER` keeps what was learned, each tensor once; "
            f"or move the file that you do not want ({found.other}?) out of the directory, and "
            "sync again.",
            reason="TENSOR_IN_TWO_FILES",
        )


def _tensors(ops: FileOps, path: Path) -> list[str]:
    try:
        return list(read_header(ops, path.resolve()).tensors)
    except ValueError:
        return []

"""What must hold before a directory is synced or exported. Nothing here writes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from apollo_grpc.errors import ApolloError, FailedPrecondition
from apollo_trainer.checkpoints.directory.loaded_files import loaded_files, twins
from apollo_trainer.checkpoints.directory.state_folder import Place, hub_repository
from apollo_trainer.checkpoints.disk import ShardHeader, read_header
from apollo_trainer.weights.checkpoint_reader import CheckpointReader

_WAYS_OUT = (
    "Nothing was written. `apollo checkpoint export FOLDER` writes what was learned into a "
    "directory of its own, which vLLM can serve and sync; do that first. (`apollo checkpoint adopt "
    "FOLDER` copies the files as they lie here, without what was learned.)"
)


def why_not_synced(place: Place, reader: CheckpointReader) -> str:
    """Why a sync would refuse the directory as it is now, in a sentence; empty: it would not."""
    try:
        require_directory(place, place.directory)
        refuse_links(place)
        headers = weight_headers(place, reader)
        refuse_read_only(place)
        _refuse_too_little_room(place, headers, reader)
    except ApolloError as error:
        return error.message
    except OSError as error:
        return f"The directory cannot be read ({error.strerror})."
    return ""


def require_directory(place: Place, asked: Path) -> None:
    """Raises FailedPrecondition where the place is no local directory, or in a hub cache."""
    if not place.ops.is_folder(place.directory):
        raise FailedPrecondition(
            f"vLLM serves {asked}, which is no local directory; nothing was written. Serve a "
            "local copy of the model to sync it.",
            reason="NOT_A_DIRECTORY",
        )
    if repository := hub_repository(place.directory):
        model = repository.name.removeprefix("models--").replace("--", "/")
        raise FailedPrecondition(
            f"{model} lies in a hub cache, whose files other revisions share. " + _WAYS_OUT,
            reason="HUB_CACHE",
        )


def refuse_read_only(place: Place) -> None:
    """Raises FailedPrecondition where the directory or its state folder takes no writes.

    Only tells it early: a disk may still refuse in the middle of a sync.
    """
    for folder in (place.directory, _existing(place)):
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise FailedPrecondition(
                f"Nothing can be written to {folder}. Make it writable for the training server"
                f"{'' if folder == place.directory else ', or name another with --checkpoint-dir'}"
                "; `apollo checkpoint export FOLDER` writes what was learned elsewhere.",
                reason="DIRECTORY_NOT_WRITABLE",
            )


def _existing(place: Place) -> Path:
    """The state folder, or the one that it would be made in."""
    return next(path for path in (place.state, *place.state.parents) if place.ops.found(path))


def _refuse_too_little_room(
    place: Place, headers: dict[str, ShardHeader], reader: CheckpointReader
) -> None:
    """Raises FailedPrecondition where not even a sync in place of all that is trained has room."""
    tensors = (pair for header in headers.values() for pair in header.tensors.items())
    needed = sum(at.size for name, at in tensors if reader.parameter(name) is not None)
    free = place.ops.room(_existing(place)) + _kept_bytes(place, headers)
    if free < needed:
        raise FailedPrecondition(
            f"What is trained takes {needed / 1e6:,.1f} MB, and the disk of {_existing(place)} has "
            f"{free / 1e6:,.1f} MB left. Make room there, or name another with --checkpoint-dir; "
            "`apollo checkpoint export FOLDER` writes what was learned to another disk.",
            reason="TOO_LITTLE_ROOM",
        )


def _kept_bytes(place: Place, shards: Iterable[str]) -> int:
    """Bytes of the earlier directories, which a sync removes on a full disk."""
    paths = (place.before(number) / shard for number in place.left_before() for shard in shards)
    found = filter(None, map(place.ops.found, paths))
    return sum(each.st_size for each in found if each.st_nlink == 1)


def refuse_links(place: Place) -> None:
    """Raises FailedPrecondition where a shard is no regular file with one name."""
    for name in place.shard_names():
        found = place.ops.stat(place.directory / name)
        if not stat.S_ISREG(found.st_mode) or place.is_linked_elsewhere(name, found):
            raise FailedPrecondition(
                f"{name} is a link: other directories share its bytes, and a sync would change or "
                "split them. " + _WAYS_OUT,
                reason="SHARD_IS_LINKED",
            )


def weight_headers(place: Place, reader: CheckpointReader) -> dict[str, ShardHeader]:
    """Headers of the shards that vLLM loads, which a sync may write.

    Raises FailedPrecondition where they do not hold all parameters, or hold one twice, and OSError.
    """
    files = loaded_files(place.ops, place.directory)
    headers = read_headers(place, files.by_vllm, reader)
    if twin := next(twins(place.ops, place.directory, files), None):
        raise FailedPrecondition(
            f"{twin.tensor} stands in {twin.file} and in {twin.other}: {twin.why}. Nothing was "
            "written. `apollo checkpoint export FOLDER` keeps what was learned, each tensor once; "
            f"or move the file that you do not want ({twin.other}?) out of the directory, and "
            "sync again.",
            reason="TENSOR_IN_TWO_FILES",
        )
    if missing := missing_from(headers, reader):
        raise _incomplete(files.by_vllm, missing)
    return headers


def read_headers(
    place: Place, files: list[str], reader: CheckpointReader
) -> dict[str, ShardHeader]:
    """Headers of these shards, links resolved.

    Raises FailedPrecondition for what is no safetensors file, and for a live tensor of another
    shape, and OSError.
    """
    headers = dict[str, ShardHeader]()
    for name in files:
        try:
            headers[name] = read_header(place.ops, (place.directory / name).resolve())
        except ValueError as error:
            raise FailedPrecondition(
                f"{name} is no safetensors file ({error}); nothing was written. Bring it back from "
                "a copy.",
                reason="SHARD_UNREADABLE",
            ) from error
        _require_shapes(name, headers[name], reader)
    return headers


def _require_shapes(shard: str, header: ShardHeader, reader: CheckpointReader) -> None:
    for name, place in header.tensors.items():
        live = reader.outline(name)
        if live is not None and tuple(live.shape) != place.shape:
            raise FailedPrecondition(
                f"The live {name} is {list(live.shape)}, which is not its shape in {shard}; "
                "nothing was written.",
                reason="CHECKPOINT_INCOMPATIBLE",
            )


def missing_from(headers: dict[str, ShardHeader], reader: CheckpointReader) -> list[str]:
    """Names of live tensors that no file holds."""
    return reader.missing_from({name for header in headers.values() for name in header.tensors})


def _incomplete(files: list[str], missing: list[str]) -> FailedPrecondition:
    more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
    read = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return FailedPrecondition(
        f"The safetensors that vLLM loads from the directory ({read or 'there are none'}) do not "
        f"hold {missing[0]}{more}; nothing was written. `apollo checkpoint export FOLDER` writes "
        "what was learned as such.",
        reason="CHECKPOINT_INCOMPLETE",
    )

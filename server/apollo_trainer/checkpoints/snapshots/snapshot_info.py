"""The description of a snapshot: one JSON file with a checksum, strictly parsed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from apollo_grpc.errors import DataLoss, InvalidArgument
from apollo_trainer.checkpoints.disk import FILES, FileOps
from apollo_trainer.checkpoints.snapshots.delta_file import is_id, require_id

FILE_NAME, FORMAT = "snapshot.json", "apollo-snapshot-1"
_MOST_BYTES = 64 * 2**20
_LONGEST_NAME = 200


@dataclass(frozen=True)
class SnapshotInfo:
    """One snapshot.

    Attributes:
        id: unique, and never used again.
        name: the user's; empty for an automatic one.
        automatic: retention may delete it.
        created: seconds since 1970, by this machine's clock. The order of snapshots is that of ids.
        optimizer_step: completed steps.
        weight_version: of the live weights then; 0 where it is not known.
        size_bytes: of its own files, without the anchor's.
        weights_bytes: of the parameters.
        anchor: the id of the anchor that it is a difference to.
        digests: of each parameter.
        state_digest: of the file of the Apollo state.
    """

    id: str
    name: str
    automatic: bool
    created: float
    optimizer_step: int
    weight_version: int
    size_bytes: int
    weights_bytes: int
    anchor: str
    digests: dict[str, str] = field(repr=False)
    state_digest: str = field(repr=False)


_KINDS: dict[str, Any] = {
    "str": str, "bool": bool, "float": (float, int), "int": int, "dict[str, str]": dict,
}  # fmt: skip


def write_info(folder: Path, info: SnapshotInfo, ops: FileOps = FILES) -> None:
    """Writes the file and does not flush it. Raises OSError where the disk refuses."""
    text = json.dumps(asdict(info), allow_nan=False, sort_keys=True)
    whole = {"format": FORMAT, "checksum": _checksum(text), "snapshot": text}
    file = ops.create(folder / FILE_NAME)
    try:
        ops.write_all(file, memoryview(json.dumps(whole).encode()), 0)
    finally:
        ops.close(file)


def read_info(folder: Path, ops: FileOps = FILES) -> SnapshotInfo:
    """The description in a snapshot's folder. Raises DataLoss where it is missing or damaged."""
    path = folder / FILE_NAME
    try:
        if ops.stat(path).st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        whole = json.loads(ops.read(path))
        if whole["format"] != FORMAT:
            raise ValueError("it is of another format")
        if whole["checksum"] != _checksum(whole["snapshot"]):
            raise ValueError("its checksum does not match")
        info = _parse(json.loads(whole["snapshot"]))
        if info.id != folder.name:
            raise ValueError("it is of another snapshot")
        return info
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataLoss(
            f"The snapshot {folder.name} cannot be read ({error}); it was left as it is. Choose "
            "another one, or delete it.",
            reason="SNAPSHOT_CORRUPT",
        ) from error


def _parse(values: dict[str, Any]) -> SnapshotInfo:
    for each in fields(SnapshotInfo):
        if not isinstance(values[each.name], _KINDS[str(each.type)]):
            raise ValueError(f"its {each.name} is {str(values[each.name])[:40]!r}")
    require_id(values["id"])
    require_id(values["anchor"])
    return SnapshotInfo(**values)


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def require_name(name: str) -> str:
    """A user's name for a snapshot, without spaces at its ends.

    Raises InvalidArgument where it is not one line, is too long, or has the form of an id.
    """
    if not name.isprintable() or not 0 < len(name.strip()) <= _LONGEST_NAME:
        raise InvalidArgument.at("name", f"must be one line of 1 to {_LONGEST_NAME} characters")
    if is_id(name.strip()):
        raise InvalidArgument.at("name", "must not look like the id of a snapshot")
    return name.strip()

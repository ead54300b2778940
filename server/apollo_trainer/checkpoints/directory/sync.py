"""Sync: the model directory becomes the live weights, by the safest way that the disk allows.

Rung 0: nothing moved. Rung 1: exchange of folders. Rung 2: renames behind a commit record. Rung 3:
in place behind a redo log, when asked for or out of room. Each is a file of its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apollo_grpc.errors import ApolloError, Cancelled, FailedPrecondition
from apollo_trainer.checkpoints.directory.exchange import (
    ExchangeRefused,
    can_exchange,
    exchange_sync,
)
from apollo_trainer.checkpoints.directory.in_place import in_place_sync
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.directory.preconditions import (
    refuse_links,
    require_directory,
    weight_headers,
)
from apollo_trainer.checkpoints.directory.recovery import edited, recover, require_as_seen
from apollo_trainer.checkpoints.directory.rollforward import rollforward_sync
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import (
    Place,
    SyncMethod,
    commit,
    held,
    is_untouched,
    place_of,
    read_manifest,
    refreshed,
)
from apollo_trainer.checkpoints.directory.survey import (
    Progress,
    Survey,
    SyncOutcome,
    Versions,
    read_baseline,
)
from apollo_trainer.checkpoints.disk import FILES, FileOps
from apollo_trainer.weights.checkpoint_reader import CheckpointReader

log = logging.getLogger(__name__)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
__all__ = ["Progress", "SyncMethod", "SyncOutcome", "sync_directory"]


@dataclass(frozen=True)
class SyncOptions:
    """How to sync.

    Attributes:
        method: None for the ladder; ROLLFORWARD or IN_PLACE for that one.
        state: the state folder; None for the one beside the directory.
        spare: what the syncs before left of this directory; None to keep nothing of it.
        seen: the shards that the engine's weights are known to be of, where the directory was never
            synced; empty where that is not known.
    """

    method: SyncMethod | None = None
    state: Path | None = None
    ops: FileOps = FILES
    spare: Spare | None = None
    seen: Mapping[str, ShardRecord] = field(default_factory=dict)


def sync_directory(
    directory: Path,
    reader: CheckpointReader,
    progress: Progress = lambda *_: None,
    versions: Versions | None = None,
    options: SyncOptions = SyncOptions(),
) -> SyncOutcome:
    """Brings the directory's safetensors up to date with the live weights.

    The weights must not change meanwhile. Files without a changed tensor are not written. Each
    tensor keeps its dtype on disk, and every value that training did not touch its bits. Tensors
    that belong to no parameter are kept as they are, and so are files that vLLM does not load.

    Args:
        versions: a number for each checkpoint tensor that is another one after every write to it;
            None where nobody counts, and all are compared.

    Raises FailedPrecondition for a directory that cannot be synced, Unavailable while another
    process works on it, OSError when the disk refuses, DataLoss where an older sync that was cut
    off cannot be finished, Cancelled where `progress` does, with all as it was. The directory is
    always wholly of one generation for whoever comes after the next sync or start of the server.
    """
    place = place_of(directory, options.ops, options.state)
    require_directory(place, directory)
    with held(place):
        try:
            return _sync(place, reader, progress, versions, options)
        except (OSError, Cancelled, FailedPrecondition):
            _clean_up(place)
            raise


def _sync(
    place: Place,
    reader: CheckpointReader,
    progress: Progress,
    versions: Versions | None,
    options: SyncOptions,
) -> SyncOutcome:
    known = recover(place)
    refuse_links(place)
    if options.seen and known is None:
        require_as_seen(place, options.seen)
    if known and versions and is_untouched(place, known):
        survey = Survey(place, reader, known, versions)
        if not survey.any_may_have_moved():
            total = sum(shard.size for shard in known.shards.values())
            progress(total, total, "")
            return survey.outcome
    headers = weight_headers(place, reader)
    meter = _Meter(progress, sum(header.size for header in headers.values()))
    baseline = refreshed(place, known) if known else read_baseline(place, headers, meter.read)
    if baseline is None:
        assert known
        raise edited(place, known)
    survey = Survey(place, reader, baseline, versions)
    shards = []
    for shard in headers:
        meter.at(shard)
        if next(survey.changed(shard), None) is not None:
            shards.append(shard)
        meter.done += headers[shard].size
    _write(survey, shards, options, meter.at)
    meter.at("")
    return survey.outcome


def _write(
    survey: Survey, shards: list[str], options: SyncOptions, began: Callable[[str], None]
) -> None:
    if not shards:
        commit(survey.place, survey.next_manifest(SyncMethod.UNCHANGED, []))
        return
    try:
        manifest = _climb(survey, shards, options, began)
    except OSError as error:
        if error.errno not in _NO_ROOM or not _may_still_fit(survey, options.method):
            raise
        if (options.spare or Spare()).give_way(survey.place):
            _write(survey, shards, options, began)
            return
        manifest = in_place_sync(survey, shards)
    survey.outcome.method = SyncMethod(manifest.method)
    survey.outcome.files_written = list(shards)
    if rounded := survey.outcome.rounded:
        log.warning(
            "%s and %d more tensors have a dtype on disk that does not hold every value of the "
            "served one: what was trained is written as the nearest that it holds",
            rounded[0],
            len(rounded) - 1,
        )


def _climb(
    survey: Survey, shards: list[str], options: SyncOptions, began: Callable[[str], None]
) -> Manifest:
    method, spare = options.method, options.spare or Spare(keeps=False)
    if method == SyncMethod.IN_PLACE:
        # A shard may have a second name in a directory before: it would be written to there too.
        if spare.give_way(survey.place):
            survey.place.ops.sync_folder(survey.place.state)
        return in_place_sync(survey, shards)
    if method != SyncMethod.ROLLFORWARD and can_exchange(survey.place):
        with contextlib.suppress(ExchangeRefused):
            return exchange_sync(survey, shards, began, spare)
        recover(survey.place)
        survey.outcome.begin_again()
    return rollforward_sync(survey, shards, began)


def _may_still_fit(survey: Survey, method: SyncMethod | None) -> bool:
    """After a full disk: whether a log of the changed tensors is smaller than the shards were."""
    place = survey.place
    if method == SyncMethod.ROLLFORWARD or place.ops.found(place.intent_path):
        return False
    _clean_up(place)
    survey.outcome.begin_again()
    return True


def _clean_up(place: Place) -> None:
    """Frees what a failed sync wrote. What was announced waits for the next sync, or the start."""
    with contextlib.suppress(OSError, ApolloError):
        if not place.ops.found(place.intent_path):
            recover(place)


class _Meter:
    """Tells progress in bytes of the directory's files; it never goes back."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self.done = progress, total, 0

    def at(self, what: str) -> None:
        """A file begins; an empty name is the end."""
        self._progress(self.done if what else self._total, self._total, what)

    def read(self, size: int) -> None:
        """Of the first reading of a directory nothing is told: it is soon read again."""


def read_generation(place: Place) -> int:
    """Of the last sync; 0 where there was none."""
    manifest = read_manifest(place)
    return manifest.generation if manifest else 0

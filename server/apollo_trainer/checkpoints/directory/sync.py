"""Sync: the model directory becomes the live weights, by the safest way that the disk allows.

Rung 0: nothing moved. Rung 1: exchange of folders. Rung 2: renames behind a commit record. Rung 3:
in place behind a redo log, when asked for or out of room.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apollo_grpc.errors import ApolloError, Cancelled, FailedPrecondition
from apollo_trainer.checkpoints.directory.exchange import (
    ExchangeRefused,
    can_exchange,
    exchange_sync,
)
from apollo_trainer.checkpoints.directory.manifest import Manifest, ShardRecord
from apollo_trainer.checkpoints.directory.preconditions import (
    refuse_links,
    require_directory,
    weight_headers,
)
from apollo_trainer.checkpoints.directory.recovery import edited, recover, require_as_seen
from apollo_trainer.checkpoints.directory.spare import Spare
from apollo_trainer.checkpoints.directory.state_folder import (
    Place,
    SyncMethod,
    commit,
    held,
    is_untouched,
    place_of,
    refreshed,
)
from apollo_trainer.checkpoints.directory.survey import (
    Progress,
    Survey,
    SyncOutcome,
    Versions,
    read_baseline,
)
from apollo_trainer.checkpoints.directory.write_ahead import in_place_sync, rollforward_sync
from apollo_trainer.checkpoints.disk import FILES, FileOps
from apollo_trainer.weights.checkpoint_reader import CheckpointReader

log = logging.getLogger(__name__)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


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
        if not any(map(survey.may_have_moved, known.tensors)):
            total = sum(shard.size for shard in known.shards.values())
            progress(total, total, "")
            return survey.outcome
    headers = weight_headers(place, reader)
    baseline = refreshed(place, known) if known else read_baseline(place, headers)
    if baseline is None:
        assert known
        raise edited(place, known)
    done, total = 0, sum(header.size for header in headers.values())
    survey = Survey(
        place, reader, baseline, versions, began=lambda file: progress(total, total, file)
    )
    for shard, header in headers.items():
        progress(done, total, shard)
        if next(survey.changed(shard), None) is not None:
            survey.shards.append(shard)
        done += header.size
    _write(survey, options)
    progress(total, total, "")
    return survey.outcome


def _write(survey: Survey, options: SyncOptions) -> None:
    if not survey.shards:
        commit(survey.place, survey.next_manifest(SyncMethod.UNCHANGED, []))
        return
    try:
        manifest = _climb(survey, options)
    except OSError as error:
        if error.errno not in _NO_ROOM or not _may_still_fit(survey, options.method):
            raise
        if (options.spare or Spare()).give_way(survey.place):
            _write(survey, options)
            return
        manifest = in_place_sync(survey)
    survey.outcome.method = SyncMethod(manifest.method)
    survey.outcome.files_written = list(survey.shards)
    if rounded := survey.outcome.rounded:
        log.warning(
            "%s and %d more tensors have a dtype on disk that does not hold every value of the "
            "served one: what was trained is written as the nearest that it holds",
            rounded[0],
            len(rounded) - 1,
        )


def _climb(survey: Survey, options: SyncOptions) -> Manifest:
    """Writes by the first rung that the options and the disk allow; returns what was committed."""
    place, method, spare = survey.place, options.method, options.spare or Spare(keeps=False)
    if method == SyncMethod.IN_PLACE:
        # A shard may have a second name in a directory before: it would be written to there too.
        if spare.give_way(place):
            place.ops.sync_folder(place.state)
        return in_place_sync(survey)
    if method != SyncMethod.ROLLFORWARD and can_exchange(place):
        with contextlib.suppress(ExchangeRefused):
            return exchange_sync(survey, spare)
        recover(place)
        survey.outcome.begin_again()
    return rollforward_sync(survey)


def _may_still_fit(survey: Survey, method: SyncMethod | None) -> bool:
    """Takes back what a full disk cut off; whether a log of the changed tensors may still fit."""
    place = survey.place
    if method == SyncMethod.ROLLFORWARD or place.ops.found(place.intent_path):
        return False
    _clean_up(place)
    survey.outcome.begin_again()
    return True


def _clean_up(place: Place) -> None:
    """Removes what a failed sync wrote. What it announced waits for the next sync, or the start."""
    with contextlib.suppress(OSError, ApolloError):
        if not place.ops.found(place.intent_path):
            recover(place)

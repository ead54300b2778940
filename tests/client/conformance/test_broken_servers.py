"""Servers that are broken in one way each are found by `apollo-conformance`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2

from apollo_client.testing import FakeServer
from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import status_pb2 as status
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.conformance.proxy import proxied
from tests.client.conformance.running import conformance


def changed(kind: Any, change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        message = kind.FromString(data)
        change(message)
        return bytes(message.SerializeToString())

    return apply


def one(method: str, spoil: Callable[[Iterator[bytes]], Iterator[bytes]]) -> dict[str, Any]:
    """Spoils the answers of one method."""
    return {"spoil": lambda name, answers: spoil(answers) if name == method else answers}


def each(method: str, kind: Any, change: Callable[[Any], None]) -> dict[str, Any]:
    """Changes each answer of one method."""
    return one(method, lambda answers: map(changed(kind, change), answers))


def without(place: int) -> Callable[[Iterator[bytes]], Iterator[bytes]]:
    return lambda answers: (a for number, a in enumerate(answers) if number != place)


def twice(answers: Iterator[bytes]) -> Iterator[bytes]:
    first = next(answers)
    yield first
    yield first
    yield from answers


def another_domain(sent: bytes) -> bytes:
    sent_status = status_pb2.Status.FromString(sent)
    info = error_details_pb2.ErrorInfo()
    sent_status.details[0].Unpack(info)
    info.domain = "example.com"
    sent_status.details[0].Pack(info)
    return bytes(sent_status.SerializeToString())


def without_fields(sent: bytes) -> bytes:
    sent_status = status_pb2.Status.FromString(sent)
    del sent_status.details[1:]
    return bytes(sent_status.SerializeToString())


def later(answer: pb.TrainResponse) -> None:
    answer.event.finished.weight_version += answer.event.HasField("finished")


def beats(answer: status.WatchStatusResponse) -> None:
    answer.heartbeat.SetInParent()


def unscored(answer: pb.ScoreSamplesResponse) -> None:
    for score in answer.scores:
        del score.log_probabilities[-1:]


def unfiltered(answer: pb.ListRunsResponse) -> None:
    answer.runs.add(run_id="another")


BROKEN = {
    "Train leaves an event out": (
        "train_streams_from_one_without_gaps",
        one("Train", without(2)),
    ),
    "Train has no end": (
        "train_ends_with_finished",
        one("Train", lambda answers: islice(answers, 3)),
    ),
    "Train counts a dry run": (
        "dry_runs_change_no_weight_version",
        each("Train", pb.TrainResponse, later),
    ),
    "WatchRun repeats a sequence": ("the_rest_of_a_run_is_told_exactly", one("WatchRun", twice)),
    "WatchRuns leaves an event out": (
        "all_runs_events_are_told_in_order",
        one("WatchRuns", without(1)),
    ),
    "WatchRuns repeats a revision": (
        "the_rest_of_all_runs_is_told_exactly",
        one("WatchRuns", twice),
    ),
    "WatchStatus begins with a heartbeat": (
        "a_watch_begins_with_a_status",
        each("WatchStatus", status.WatchStatusResponse, beats),
    ),
    "ListRuns forgets pages": (
        "pages_of_runs_join_to_the_whole",
        each("ListRuns", pb.ListRunsResponse, lambda answer: answer.ClearField("next_page_token")),
    ),
    "ListRuns does not choose": (
        "runs_are_filtered",
        each("ListRuns", pb.ListRunsResponse, unfiltered),
    ),
    "ScoreSamples forgets a token": (
        "each_token_is_scored",
        each("ScoreSamples", pb.ScoreSamplesResponse, unscored),
    ),
    "GetServerInfo has another version": (
        "status_and_info_agree",
        each(
            "GetServerInfo",
            status.GetServerInfoResponse,
            lambda answer: setattr(answer, "server_version", "9"),
        ),
    ),
    "CreateDataset has another digest": (
        "the_digest_is_of_the_samples",
        each(
            "CreateDataset",
            dataset_pb2.CreateDatasetResponse,
            lambda answer: setattr(answer.dataset, "digest", "0" * 64),
        ),
    ),
    "GetStatus has no answer": (
        "status_answers_always",
        one("GetStatus", lambda answers: iter(())),
    ),
    "no answer": ("limits_are_told", one("GetServerInfo", lambda answers: iter(()))),
    "bytes that are no message": (
        "a_run_is_created_at_once",
        one("CreateRun", lambda answers: iter([b"\xff"])),
    ),
    "errors have no details": ("unknown_runs_are_not_found", {"details": lambda sent: None}),
    "errors have another domain": ("unknown_datasets_are_not_found", {"details": another_domain}),
    "errors name no fields": ("missing_fields_are_named", {"details": without_fields}),
}


@pytest.mark.parametrize(("promise", "broken"), BROKEN.values(), ids=BROKEN)
def test_a_broken_server_is_found(
    promise: str, broken: dict[str, Any], fake: FakeServer, folder: Path
) -> None:
    with proxied(fake.address, folder, **broken) as (_, address):
        done = conformance(address, "--only", promise)
    assert done.returncode == 1
    told, seen, summary = done.stdout.splitlines()
    assert told.startswith("failed") and promise in told
    assert seen.strip()
    assert summary == "0 passed, 1 failed, 0 not applicable"

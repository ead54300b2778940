"""A page is told each event once and in order, whatever its subscription has lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from apollo_client.dashboard.feed import EVENTS, Feed
from apollo_grpc.errors import NotFound, OutOfRange
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb


def events(run_id: str, count: int) -> list[pb.RunEvent]:
    return [
        pb.RunEvent(run_id=run_id, sequence=n, step=pb.RunEvent.Step(step=n, loss=1.0))
        for n in range(1, count + 1)
    ]


class Client:
    """Holds runs of so many events; its subscription tells these updates."""

    def __init__(self, updates: list[status_pb2.WatchStatusResponse], **runs: int):
        self.runs = {name: events(name, count) for name, count in runs.items()}
        self.known, self.updates = dict(runs), updates
        self.pruned: set[str] = set()

    def list_runs(self, page_size: int, states: Any = ()) -> Any:
        found = [pb.Run(run_id=name, last_sequence=count) for name, count in self.known.items()]
        return SimpleNamespace(runs=found[:page_size] if not states else found[-1:])

    def get_run(self, run_id: str) -> pb.Run:
        if run_id not in self.runs:
            raise NotFound("gone")
        return pb.Run(run_id=run_id)

    def list_snapshots(self) -> Any:
        return SimpleNamespace(snapshots=[])

    @contextmanager
    def watch(self) -> Iterator[Any]:
        yield iter(self.updates)

    @contextmanager
    def watch_run(self, run_id: str, after: int) -> Iterator[Any]:
        if run_id in self.pruned:
            raise OutOfRange("pruned")
        yield iter(self.runs[run_id][after:])


def update(event: pb.RunEvent) -> status_pb2.WatchStatusResponse:
    return status_pb2.WatchStatusResponse(event=event)


def steps(feed: Feed, run_id: str) -> list[int]:
    told = [value for kind, value in feed if kind == "event"]
    return [int(value["sequence"]) for value in told if value["run_id"] == run_id]


@given(st.integers(0, 12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_what_a_subscription_dropped_or_told_twice_is_told_once(
    known: int, kept: list[bool]
) -> None:
    """Some events are listed already; of all of them the subscription tells any and the last."""
    every = events("a", 12)
    told = [event for event, keep in zip(every, kept, strict=True) if keep or event.sequence == 12]
    client = Client([update(event) for event in told], a=12)
    client.known = {"a": known} if known else {}
    assert steps(Feed(client), "a") == list(range(1, 13))  # type: ignore[arg-type]


def test_of_a_long_run_the_last_events_are_told() -> None:
    client = Client([], a=EVENTS + 500)
    assert steps(Feed(client), "a") == list(range(501, EVENTS + 501))  # type: ignore[arg-type]


def test_what_was_pruned_or_deleted_is_passed_over() -> None:
    client = Client([update(events("b", 3)[2])], a=5)
    client.pruned = {"a", "b"}
    feed = list(Feed(client))  # type: ignore[arg-type]
    assert [value["sequence"] for kind, value in feed if kind == "event"] == ["3"]
    assert [value["run_id"] for kind, value in feed if kind == "run"] == ["a"]

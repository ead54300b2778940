"""What a page is told: what is known already, and then everything that happens, none of it lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from apollo_client.client import ApolloClient
from apollo_grpc.errors import NotFound, OutOfRange
from apollo_grpc.v1 import training_pb2

# Newest runs that a page begins with, and the last events of each.
RUNS, EVENTS = 12, 2000
# Between two looks at the snapshots, at least.
SNAPSHOT_SECONDS = 2.0
# Lists of a step and kinds of events that no page shows, and that may be long.
_LISTS = ("sample_indices", "sample_losses")
_SHOWN = {"started", "step", "warning", "probed", "finished"}
# With these the run's own row changes.
_TURNS = {"queued", "started", "finished"}

Told = tuple[str, Any]


class Feed:
    """Messages for one page, each a kind and what JSON can hold.

    `run` and `event` are of one run, `status` and `snapshots` of the server; `beat` says that
    nothing happened. Iterated on one thread; raises `ApolloError` when the server goes away.
    """

    def __init__(self, client: ApolloClient):
        self._client = client
        # Of each run, the sequence of the last event that was told.
        self._told: dict[str, int] = {}
        self._looked_at = 0.0

    def __iter__(self) -> Iterator[Told]:
        # Opened first: what happens while the past is told waits in it, or is fetched by sequence.
        with self._client.watch() as updates:
            yield from self._past()
            for update in updates:
                if update.HasField("event"):
                    yield from self._news(update.event)
                elif update.HasField("status"):
                    yield "status", _plain(update.status)
                else:
                    yield "beat", {}
                yield from self._snapshots()

    def _past(self) -> Iterator[Told]:
        """The runs that are known, the oldest first, and their events."""
        running = self._client.list_runs(page_size=RUNS, states=["RUNNING"]).runs
        newest = self._client.list_runs(page_size=RUNS).runs
        for run in reversed(list({run.run_id: run for run in (*newest, *running)}.values())):
            yield "run", _row(run)
            self._told[run.run_id] = max(0, run.last_sequence - EVENTS)
            yield from self._until(run.run_id, run.last_sequence)

    def _news(self, event: training_pb2.RunEvent) -> Iterator[Told]:
        """An event that was not told yet, and before it those that were dropped."""
        run_id, sequence = event.run_id, event.sequence
        missing = sequence - 1 - self._told.setdefault(run_id, 0)
        if missing < 0:
            return
        if missing or event.WhichOneof("event") in _TURNS:
            with suppress(NotFound):
                yield "run", _row(self._client.get_run(run_id))
        yield from self._until(run_id, sequence - 1)
        yield from self._tell(event)

    def _until(self, run_id: str, sequence: int) -> Iterator[Told]:
        """A run's events that were not told yet, up to one; none of those that are not kept."""
        if self._told[run_id] >= sequence:
            return
        with (
            suppress(NotFound, OutOfRange),
            self._client.watch_run(run_id, self._told[run_id]) as events,
        ):
            for event in events:
                yield from self._tell(event)
                if event.sequence >= sequence:
                    break

    def _tell(self, event: training_pb2.RunEvent) -> Iterator[Told]:
        self._told[event.run_id] = event.sequence
        if event.WhichOneof("event") in _SHOWN:
            told = _plain(event)
            for name in _LISTS:
                told.get("step", {}).pop(name, None)
            yield "event", told

    def _snapshots(self) -> Iterator[Told]:
        if time.monotonic() - self._looked_at < SNAPSHOT_SECONDS:
            return
        self._looked_at = time.monotonic()
        yield "snapshots", [_plain(each) for each in self._client.list_snapshots().snapshots]


def _row(run: training_pb2.Run) -> dict[str, Any]:
    """A run without what it learns: that stays where it is."""
    told = _plain(run)
    told["name"] = told.pop("spec", {}).get("name", "")
    return told


def _plain(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)

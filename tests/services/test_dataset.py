"""Datasets over the socket: brought in messages, named by runs, kept over restarts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

import apollo_grpc.interceptors as interceptors_module
from apollo_grpc.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1.dataset_pb2_grpc import DatasetServiceStub
from tests.waiting import HANG, wait_until

Request = dataset_pb2.CreateDatasetRequest
LONG = {"epochs": 100_000, "dry_run": True}


def sample(first: int, tokens: int = 4) -> pb.Sample:
    ids = pb.TokenSample(context_ids=[first, 61], continuation_ids=range(70, 70 + tokens))
    return pb.Sample(tokens=ids)


class Datasets:
    """What a caller does with datasets."""

    def __init__(self, caller: Any):
        self.stub = DatasetServiceStub(caller.channel)

    def bring(self, *parts: Sequence[pb.Sample], name: str = "") -> dataset_pb2.Dataset:
        requests = [Request(samples=part) for part in parts]
        requests[0].name = name
        return self.stub.CreateDataset(iter(requests), timeout=HANG).dataset

    def get(self, dataset_id: str) -> dataset_pb2.Dataset:
        request = dataset_pb2.GetDatasetRequest(dataset_id=dataset_id)
        return self.stub.GetDataset(request, timeout=HANG).dataset

    def list(self, **fields: Any) -> dataset_pb2.ListDatasetsResponse:
        return self.stub.ListDatasets(dataset_pb2.ListDatasetsRequest(**fields), timeout=HANG)

    def delete(self, dataset_id: str) -> None:
        request = dataset_pb2.DeleteDatasetRequest(dataset_id=dataset_id)
        self.stub.DeleteDataset(request, timeout=HANG)


@pytest.fixture
def datasets(caller: Any) -> Datasets:
    return Datasets(caller)


def losses(events: list[pb.RunEvent]) -> list[float]:
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED, events[-1]
    return [event.step.loss for event in events if event.HasField("step")]


def test_a_run_of_a_dataset_is_a_run_of_its_samples(caller: Any, datasets: Datasets) -> None:
    samples = [sample(60), sample(64, 9), sample(66)]
    made = datasets.bring(samples[:1], samples[1:], name="three")
    assert (made.name, made.samples) == ("three", 3) and made == datasets.get(made.dataset_id)
    asked = {"epochs": 2, "seed": 5, "samples_per_step": 2, "dry_run": True, "evaluate": True}
    sent = caller.train(samples=samples, **asked)
    named = caller.train(samples=[], dataset_id=made.dataset_id, **asked)
    assert losses(sent) == losses(named) and len(losses(named)) == 4
    told = [[e.evaluated.losses for e in run if e.HasField("evaluated")] for run in (sent, named)]
    assert told[0] == told[1]


def test_the_same_request_of_a_dataset_attaches(caller: Any, datasets: Datasets) -> None:
    made = datasets.bring([sample(60)])
    asked = {"samples": [], "dataset_id": made.dataset_id}
    first = caller.train("again", **asked)
    datasets.delete(made.dataset_id)
    assert caller.train("again", **asked) == first


def test_pages_are_newest_first(datasets: Datasets) -> None:
    made = [datasets.bring([sample(number)], name=str(number)) for number in range(5)]
    page = datasets.list(page_size=2)
    assert [each.name for each in page.datasets] == ["4", "3"]
    datasets.delete(made[3].dataset_id)
    rest = datasets.list(page_token=page.next_page_token)
    assert [each.name for each in rest.datasets] == ["2", "1", "0"] and not rest.next_page_token


def test_what_is_wrong_is_told_by_its_place_in_the_whole(
    datasets: Datasets, error_of: Any, state_dir: Path
) -> None:
    good = [sample(60)] * 10
    negative = pb.Sample(tokens=pb.TokenSample(context_ids=[1, -2], continuation_ids=[3]))
    for wrong, path in (
        (pb.Sample(), "samples[25]"),
        (negative, "samples[25].tokens.context_ids[1]"),
        (pb.Sample(tokens=sample(1).tokens, weight=-1), "samples[25].weight"),
        (pb.Sample(tokens=sample(1).tokens, token_weights=[1]), "samples[25].token_weights"),
        (pb.Sample(text=pb.TextSample(context="a")), "samples[25].text.continuation"),
        (pb.Sample(chat=pb.ChatSample()), "samples[25].chat.messages"),
        (pb.Sample(tokens=sample(1).tokens, advantages=[1, 2]), "samples[25].advantages"),
    ):
        parts = good, good, [*good[:5], wrong, *good]
        error = error_of(partial(datasets.bring, *parts))
        assert [violation.field for violation in error.violations] == [path]
        assert (type(error), error.reason) == (InvalidArgument, "SAMPLE_INVALID")
    assert not datasets.list().datasets
    assert list((state_dir / "datasets").iterdir()) == []


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([], "samples"),
        ([Request(name="empty")], "samples"),
        ([Request(name="a" * 257, samples=[sample(1)])], "name"),
        ([Request(samples=[sample(1)]), Request(name="late", samples=[sample(1)])], "name"),
    ],
)
def test_a_stream_that_is_wrong_keeps_nothing(
    datasets: Datasets, error_of: Any, state_dir: Path, requests: list[Request], field: str
) -> None:
    error = error_of(lambda: datasets.stub.CreateDataset(iter(requests), timeout=HANG))
    assert [violation.field for violation in error.violations] == [field]
    assert list((state_dir / "datasets").iterdir()) == []


def test_bytes_that_are_no_message_are_refused_in_the_middle(caller: Any, state_dir: Path) -> None:
    parts = [Request(samples=[sample(1)]).SerializeToString(), b"\xff\xff\xff"]
    call = caller.channel.stream_unary("/apollo.v1.DatasetService/CreateDataset")
    with pytest.raises(grpc.RpcError) as caught:
        call(iter(parts), timeout=HANG)
    assert from_rpc_error(caught.value).reason == "REQUEST_UNREADABLE"
    assert list((state_dir / "datasets").iterdir()) == []


def test_a_caller_that_leaves_in_the_middle_keeps_nothing(
    caller: Any, datasets: Datasets, state_dir: Path
) -> None:
    for _ in range(20):
        sent, leave = threading.Semaphore(0), threading.Event()

        def requests(sent: Any = sent, leave: Any = leave) -> Iterator[Request]:
            for number in range(3):
                yield Request(samples=[sample(number)])
                sent.release()
            leave.wait(HANG)

        call = datasets.stub.CreateDataset.future(requests(), timeout=HANG)
        for _ in range(3):
            assert sent.acquire(timeout=HANG)
        call.cancel()
        leave.set()
    wait_until(lambda: not list((state_dir / "datasets").iterdir()), "the end of the uploads")
    assert not datasets.list().datasets


def test_a_slow_caller_keeps_no_other_waiting_and_is_ended(
    datasets: Datasets, monkeypatch: pytest.MonkeyPatch, error_of: Any
) -> None:
    never = threading.Event()

    def slow() -> Iterator[Request]:
        yield Request(samples=[sample(1)])
        never.wait(HANG)

    calls = [datasets.stub.CreateDataset.future(slow(), timeout=HANG) for _ in range(8)]
    assert datasets.bring([sample(2)]).samples == 1
    monkeypatch.setattr(interceptors_module, "READ_SECONDS", 0.05)
    error = error_of(lambda: datasets.stub.CreateDataset(slow(), timeout=HANG))
    never.set()
    assert (type(error), error.reason) == (DeadlineExceeded, "REQUEST_TOO_SLOW")
    assert {call.result(HANG).dataset.samples for call in calls} == {1}


def test_a_dataset_that_a_run_needs_is_kept_until_it_has_ended(
    caller: Any, datasets: Datasets, error_of: Any
) -> None:
    made = datasets.bring([sample(60)])
    at_work = caller.start(**LONG)
    run_id = next(at_work).event.run_id
    waits = caller.start(samples=[], dataset_id=made.dataset_id)
    waiting = next(waits).event.run_id
    error = error_of(lambda: datasets.delete(made.dataset_id))
    assert (type(error), error.reason) == (FailedPrecondition, "DATASET_IN_USE")
    assert error.metadata["run_id"] == waiting
    caller.cancel(run_id)
    assert losses([answer.event for answer in waits])
    # Whoever read that a run has finished may delete what it needed.
    datasets.delete(made.dataset_id)
    assert not datasets.list().datasets


def test_a_dataset_that_is_not_there_is_told(
    caller: Any, datasets: Datasets, error_of: Any
) -> None:
    for ask in (
        lambda: datasets.get("0" * 32),
        lambda: datasets.delete("../ledger.sqlite"),
        lambda: caller.train(samples=[], dataset_id="0" * 32),
    ):
        error = error_of(ask)
        assert (type(error), error.reason) == (NotFound, "DATASET_NOT_FOUND")
    assert error.message.startswith("spec.dataset_id: ")
    made = datasets.bring([sample(60)])
    error = error_of(lambda: caller.train(dataset_id=made.dataset_id))
    assert [violation.field for violation in error.violations] == ["spec.dataset_id"]


def test_what_vllm_makes_of_a_dataset_is_checked_with_the_run(
    caller: Any, datasets: Datasets, error_of: Any
) -> None:
    beyond = pb.Sample(tokens=pb.TokenSample(context_ids=[1], continuation_ids=[2**31 - 1]))
    made = datasets.bring([sample(60), beyond])
    error = error_of(lambda: caller.train(samples=[], dataset_id=made.dataset_id))
    fields = [violation.field for violation in error.violations]
    assert fields == ["spec.dataset_id[1].tokens.continuation_ids[0]"]


def test_a_run_reads_its_dataset_again_after_a_restart(
    start_engine: Any, start_server: Any, state_dir: Path
) -> None:
    start_engine()
    caller = start_server()
    caller.wait_attached()
    datasets = Datasets(caller)
    whole, broken = (datasets.bring([sample(number)]) for number in (60, 64))
    at_work = caller.start(**LONG)
    assert next(at_work).event.HasField("queued")
    run_ids = [
        next(caller.start(samples=[], dataset_id=made.dataset_id)).event.run_id
        for made in (whole, broken)
    ]
    caller.stop()
    path = state_dir / "datasets" / broken.dataset_id
    path.write_bytes(b"x" + path.read_bytes()[1:])
    caller = start_server()
    ends = [caller.events_of(run_id)[-1].finished for run_id in run_ids]
    assert [end.state for end in ends] == [pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED], ends
    assert ends[1].failure.reason == "DATASET_DAMAGED"


def test_a_damaged_dataset_is_refused(
    caller: Any, datasets: Datasets, error_of: Any, state_dir: Path
) -> None:
    made = datasets.bring([sample(60)])
    path = state_dir / "datasets" / made.dataset_id
    path.write_bytes(b"x" + path.read_bytes()[1:])
    error = error_of(lambda: caller.train(samples=[], dataset_id=made.dataset_id))
    assert (type(error), error.reason) == (DataLoss, "DATASET_DAMAGED")


def test_the_limits_are_the_settings(start_engine: Any, start_server: Any, error_of: Any) -> None:
    start_engine()
    caller = start_server(max_samples=2, max_dataset_samples=3, dataset_mebibytes=1)
    caller.wait_attached()
    datasets = Datasets(caller)
    made = datasets.bring([sample(number) for number in (60, 61, 62)])
    # A dataset has a limit of its own.
    assert len(losses(caller.train(samples=[], dataset_id=made.dataset_id))) == 3
    error = error_of(lambda: datasets.bring([sample(60)] * 2, [sample(60)] * 2))
    assert (type(error), error.reason) == (ResourceExhausted, "DATASET_TOO_LARGE")
    error = error_of(lambda: datasets.bring([sample(60, 600_000)]))
    assert (type(error), error.reason) == (ResourceExhausted, "DATASETS_FULL")

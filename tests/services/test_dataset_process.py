"""A server of its own takes a large dataset in little memory, and is killed while it takes one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from apollo_client import ApolloClient
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1.dataset_pb2_grpc import DatasetServiceStub
from tests.server_process import ServerProcess, served
from tests.waiting import HANG, wait_until

SAMPLES, PART = 50_000, 250
# All of them take four times that on disk, and more as messages.
MAX_GROWTH_KIB = 24 * 1024


def large(number: int) -> pb.Sample:
    text = pb.TextSample(context=f"{number:04d}" * 512, continuation="b")
    return pb.Sample(text=text)


def small(number: int) -> pb.Sample:
    tokens = pb.TokenSample(context_ids=[number, 61], continuation_ids=[70, 71])
    return pb.Sample(tokens=tokens)


def files(server: ServerProcess) -> list[Path]:
    return list((server.folder / "datasets").iterdir())


def test_fifty_thousand_samples_take_no_memory(tiny_model: Path) -> None:
    part = dataset_pb2.CreateDatasetRequest(samples=map(large, range(PART))).SerializeToString()
    with served(tiny_model) as server, Endpoint(server.address).channel() as channel:
        create = channel.stream_unary("/apollo.v1.DatasetService/CreateDataset")
        create(iter([part] * 40), timeout=HANG)
        before, grown = server.memory_kib(), list[int]()

        def requests() -> Iterator[bytes]:
            for _ in range(SAMPLES // PART):
                grown.append(server.memory_kib() - before)
                yield part

        answer = create(requests(), timeout=HANG)
        made = dataset_pb2.CreateDatasetResponse.FromString(answer).dataset
        assert (made.samples, made.size_bytes > 4 * 1024 * MAX_GROWTH_KIB) == (SAMPLES, True)
        grown.append(server.memory_kib() - before)
        assert max(grown) < MAX_GROWTH_KIB


def test_a_kill_in_the_middle_of_an_upload_leaves_nothing_of_it(tiny_model: Path) -> None:
    with served(tiny_model) as server:
        with ApolloClient(server.address) as client:
            kept = client.create_dataset([small(1), small(2)], name="kept")
        never = threading.Event()

        def requests() -> Iterator[Any]:
            for number in range(3):
                yield dataset_pb2.CreateDatasetRequest(samples=[large(number)] * PART)
            never.wait(HANG)

        with Endpoint(server.address).channel() as channel:
            call = DatasetServiceStub(channel).CreateDataset.future(requests(), timeout=HANG)
            wait_until(lambda: sum(f.stat().st_size for f in files(server)) > 10**6, "the samples")
            server.end(signal.SIGKILL)
            assert isinstance(call.exception(HANG), grpc.RpcError)
            never.set()
        assert len(files(server)) == 2
        server.start()
        server.wait_attached()
        with ApolloClient(server.address) as client:
            assert list(client.datasets().datasets) == [kept]
            named = list(client.train(dataset_id=kept.dataset_id))
        assert named[-1].finished.state == pb.RUN_STATE_SUCCEEDED
        assert [file.name for file in files(server)] == [kept.dataset_id]

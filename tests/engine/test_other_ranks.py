"""Which engines have trainer ranks of their own, and on what these compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.config import Settings
from apollo_trainer.engine import other_ranks
from apollo_trainer.engine.other_ranks import OtherRanks
from apollo_trainer.parallel.ranks import ALONE
from apollo_trainer.weights.attach import Checks

ON_GPU = pb.Buffer(cuda_ipc=pb.CudaIpcHandle(device_uuid="GPU-2"))


class Started:
    """In place of processes: what they would have been started with."""

    def __init__(self, size: int, folder: Path, begin: Any, ended: Any, device: int | None):
        self.ranks, self.size, self.device = ALONE, size, device


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    found = list[Started]()

    def start(*args: Any) -> Started:
        found.append(Started(*args))
        return found[-1]

    def device_of(buffers: list[pb.Buffer]) -> int | None:
        return 1 if buffers else None

    monkeypatch.setattr(other_ranks, "Followers", start)
    monkeypatch.setattr(other_ranks, "device_of", device_of)
    return found


def begin(tmp_path: Path, size: int, buffers: list[pb.Buffer], **settings: bool) -> None:
    manifest = pb.WeightManifest(tensor_parallel_size=size, buffers=buffers)
    ranks = OtherRanks(Settings(state_dir=tmp_path, **settings), print)
    ranks.begin("epoch", manifest, Checks())


def test_one_worker_has_none(tmp_path: Path, started: list[Started]) -> None:
    begin(tmp_path, 1, [ON_GPU])
    assert not started


def test_workers_on_cpus_have_ranks_on_cpus(tmp_path: Path, started: list[Started]) -> None:
    begin(tmp_path, 2, [])
    assert [(each.size, each.device) for each in started] == [(2, None)]


def test_several_gpus_are_refused_unless_they_are_asked_for(
    tmp_path: Path, started: list[Started]
) -> None:
    with pytest.raises(FailedPrecondition, match="--several-gpus") as refused:
        begin(tmp_path, 2, [ON_GPU])
    assert refused.value.reason == "TENSOR_PARALLEL_UNSUPPORTED"
    assert not started
    begin(tmp_path, 2, [ON_GPU], several_gpus=True)
    assert [each.device for each in started] == [1]

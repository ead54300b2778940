"""A store in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.datasets import DatasetStore


def sample(first: int, tokens: int = 4) -> pb.Sample:
    ids = pb.TokenSample(context_ids=[first, 61], continuation_ids=range(70, 70 + tokens))
    return pb.Sample(tokens=ids)


def bring(store: DatasetStore, *parts: Sequence[pb.Sample], name: str = "") -> dataset_pb2.Dataset:
    """A dataset of these messages of samples."""
    upload = store.begin(name)
    try:
        for part in parts:
            upload.add(part)
        upload.flush()
        return upload.publish()
    finally:
        upload.close()


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[..., DatasetStore]:
    """Opens the store of the test's folder, as a server's start does."""

    def make(**options: Any) -> DatasetStore:
        chosen: dict[str, Any] = {"limit_bytes": 2**20, "max_samples": 100} | options
        return DatasetStore(tmp_path / "datasets", **chosen)

    return make


@pytest.fixture
def store(open_store: Callable[..., DatasetStore]) -> DatasetStore:
    return open_store()

"""DatasetService of a fake server."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Any

from apollo_client.testing.checks import check_samples
from apollo_client.testing.memory import KeptDataset, Memory, not_found
from apollo_client.testing.paging import page_of, refuse, wrong_page
from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.times import now
from apollo_grpc.v1 import dataset_pb2 as pb
from apollo_grpc.v1 import training_pb2


class Datasets:
    """Each method is an RPC by its name."""

    def __init__(self, memory: Memory):
        self._memory = memory

    def create_dataset(
        self, requests: Iterator[pb.CreateDatasetRequest], context: Any
    ) -> pb.CreateDatasetResponse:
        """Keeps samples, once all came."""
        name, samples, digest, size = "", list[training_pb2.Sample](), hashlib.sha256(), 0
        for number, request in enumerate(requests):
            name = name if number else request.name
            check_samples(request.samples, "samples[{}]", len(samples))
            samples += request.samples
            for data in (sample.SerializeToString() for sample in request.samples):
                digest.update(struct.pack("<I", len(data)) + data)
                size += len(data)
        if not samples:
            raise InvalidArgument.at("samples", "are empty: nothing to learn")
        made = pb.Dataset(
            dataset_id=digest.hexdigest()[:32],
            name=name,
            digest=digest.hexdigest(),
            samples=len(samples),
            size_bytes=size,
            create_time=now(),
        )
        with self._memory.changed:
            kept = KeptDataset(self._memory.number(), made, samples)
            kept = self._memory.datasets.setdefault(made.dataset_id, kept)
        return pb.CreateDatasetResponse(dataset=kept.message)

    def get_dataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.GetDatasetResponse:
        """One dataset."""
        return pb.GetDatasetResponse(dataset=self._named(request).message)

    def list_datasets(
        self, request: pb.ListDatasetsRequest, context: Any
    ) -> pb.ListDatasetsResponse:
        """A page of datasets."""
        refuse(wrong_page(request))
        with self._memory.changed:
            kept = list(self._memory.datasets.values())
        page, token = page_of(kept, lambda each: each.number, request)
        return pb.ListDatasetsResponse(datasets=[k.message for k in page], next_page_token=token)

    def delete_dataset(
        self, request: pb.DeleteDatasetRequest, context: Any
    ) -> pb.DeleteDatasetResponse:
        """Deletes one that no run needs."""
        with self._memory.changed:
            name = self._named(request).message.dataset_id
            runs = self._memory.runs.values()
            if any(kept.run.spec.dataset_id == name and not kept.has_ended for kept in runs):
                words = "A run that has not ended needs the dataset; it was left as it is."
                raise FailedPrecondition(words, reason="DATASET_IN_USE")
            del self._memory.datasets[name]
        return pb.DeleteDatasetResponse()

    def _named(self, request: Any) -> KeptDataset:
        if not request.dataset_id:
            raise InvalidArgument.at("dataset_id", "is missing")
        found = self._memory.datasets.get(request.dataset_id)
        if found is None:
            raise not_found("dataset", request.dataset_id)
        return found

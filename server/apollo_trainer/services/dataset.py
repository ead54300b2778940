"""DatasetService: takes samples as they come, and tells which are kept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import dataset_pb2 as pb
from apollo_grpc.v1 import dataset_pb2_grpc as pb_grpc
from apollo_trainer.datasets import Upload, place
from apollo_trainer.requests.structure import require_structure
from apollo_trainer.runs import NeededDatasets
from apollo_trainer.services.paging import DEFAULT_SIZE, MAX_SIZE
from apollo_trainer.services.streams import StreamLimit

T = TypeVar("T")
MAX_NAME_BYTES = 256
# One writes while another one waits for the disk.
WRITING_THREADS = 2
_TOKEN = re.compile(r"([0-9]{20})-([0-9a-f]{32})")


class DatasetService(pb_grpc.DatasetServiceServicer):
    """Serves the datasets of one server, on its event loop; a message at a time holds a thread."""

    def __init__(self, datasets: NeededDatasets, streams: StreamLimit):
        self._datasets, self._streams = datasets, streams
        self._writing = ThreadPoolExecutor(WRITING_THREADS, "datasets")

    async def CreateDataset(  # noqa: N802
        self, requests: AsyncIterator[pb.CreateDatasetRequest], context: Any
    ) -> pb.CreateDatasetResponse:
        """Keeps what a stream brings once it has ended well; nothing of it otherwise."""
        with self._streams.one(context.peer()):
            upload: Upload | None = None
            try:
                async for request in requests:
                    if upload is None:
                        upload = self._begin(request.name)
                    elif request.name:
                        raise InvalidArgument.at("name", "is for the first message alone")
                    await self._on_disk(_add, upload, request)
                if upload is None:
                    raise InvalidArgument.at("samples", "is empty: nothing to learn")
                # A stream that was cut off ends as one that was closed does; it takes no answer.
                await context.send_initial_metadata(())
                await self._on_disk(upload.flush)
                made = await self._on_disk(upload.publish)
            finally:
                if upload is not None:
                    await self._on_disk(upload.close)
        return pb.CreateDatasetResponse(dataset=made)

    def _begin(self, name: str) -> Upload:
        if len(name.encode()) > MAX_NAME_BYTES:
            raise InvalidArgument.at("name", f"is longer than {MAX_NAME_BYTES} bytes")
        return self._datasets.store.begin(name)

    async def GetDataset(  # noqa: N802
        self, request: pb.GetDatasetRequest, context: Any
    ) -> pb.GetDatasetResponse:
        """One dataset."""
        _require_id(request.dataset_id)
        return pb.GetDatasetResponse(dataset=self._datasets.store.get(request.dataset_id))

    async def ListDatasets(  # noqa: N802
        self, request: pb.ListDatasetsRequest, context: Any
    ) -> pb.ListDatasetsResponse:
        """A page of datasets, newest first; its token is the place of its last one."""
        if request.page_size < 0:
            raise InvalidArgument.at("page_size", "must not be negative")
        before = _place_of(request.page_token) if request.page_token else None
        found = self._datasets.store.all()
        older = [each for each in found if before is None or place(each) < before]
        page = older[: min(request.page_size or DEFAULT_SIZE, MAX_SIZE)]
        token = "{:020d}-{}".format(*place(page[-1])) if len(page) < len(older) else ""
        return pb.ListDatasetsResponse(datasets=page, next_page_token=token)

    async def DeleteDataset(  # noqa: N802
        self, request: pb.DeleteDatasetRequest, context: Any
    ) -> pb.DeleteDatasetResponse:
        """Deletes one that no run needs."""
        _require_id(request.dataset_id)
        await self._on_disk(self._datasets.delete, request.dataset_id)
        return pb.DeleteDatasetResponse()

    async def _on_disk(self, work: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writing, work, *arguments)


def _add(upload: Upload, request: pb.CreateDatasetRequest) -> None:
    require_structure(request.samples, "samples[{}]", upload.samples)
    upload.add(request.samples)


def _place_of(token: str) -> tuple[int, str]:
    found = _TOKEN.fullmatch(token)
    if not found:
        raise InvalidArgument.at("page_token", "is none that this server gave")
    return int(found[1]), found[2]


def _require_id(dataset_id: str) -> None:
    if not dataset_id:
        raise InvalidArgument.at("dataset_id", "is required")

# `make protos` makes dataset_calls.py, the blocking client's calls, from this file.
"""Calls about samples that the server keeps, for runs that name them."""

from __future__ import annotations

from apollo_client.aio_calls import AsyncCalls
from apollo_client.aio_sending import AsyncSending
from apollo_client.connection import message
from apollo_client.data import AsyncSamples, Columns
from apollo_client.placing import in_user_words
from apollo_client.uploads import Upload
from apollo_grpc.errors import ApolloError
from apollo_grpc.v1 import dataset_pb2 as pb
from apollo_grpc.v1.dataset_pb2_grpc import DatasetServiceStub


class AsyncDatasetCalls(AsyncCalls):
    """Datasets: more samples than one request holds, or the same for many runs."""

    _datasets: DatasetServiceStub

    async def create_dataset(
        self, samples: AsyncSamples, *, name: str = "", columns: Columns = None
    ) -> pb.Dataset:
        """Brings samples to the server, for `train(dataset_id=...)`; returns once they are on disk.

        They are sent as they come: a generator of many is never in memory as a whole. The same
        samples are the same dataset, which has the name that it got first.

        Raises InvalidArgument with each wrong sample, ResourceExhausted for more than the server
        takes. Nothing is kept then, nor where the connection breaks.
        """
        upload = Upload(name, columns)
        create = self._datasets.CreateDataset
        sending = AsyncSending(self._begin, create, self._endpoint, self._lifetime)
        try:
            async for each in upload.aio_messages(samples):
                await sending.send(each)
            answer = await sending.answer()
        except ApolloError as error:
            raise in_user_words(error, upload.places) from None
        finally:
            sending.close()
        dataset: pb.Dataset = answer.dataset
        return dataset

    async def dataset(self, dataset_id: str) -> pb.Dataset:
        """One dataset. Raises NotFound for one that is not there."""
        request = message(pb.GetDatasetRequest, dataset_id=dataset_id)
        answer = await self._answer(self._datasets.GetDataset, request)
        dataset: pb.Dataset = answer.dataset
        return dataset

    async def datasets(self, page_size: int = 0, page_token: str = "") -> pb.ListDatasetsResponse:
        """A page of datasets, newest first."""
        request = message(pb.ListDatasetsRequest, page_size=page_size, page_token=page_token)
        page: pb.ListDatasetsResponse = await self._answer(self._datasets.ListDatasets, request)
        return page

    async def delete_dataset(self, dataset_id: str) -> None:
        """Deletes one. Raises FailedPrecondition while a run that has not ended needs it."""
        request = message(pb.DeleteDatasetRequest, dataset_id=dataset_id)
        await self._answer(self._datasets.DeleteDataset, request)

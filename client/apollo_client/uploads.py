"""A dataset on its way to the server, in messages of about one MiB."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping

from apollo_client.connection import message
from apollo_client.data import AsyncSamples, Columns, Samples, items_of
from apollo_client.forms import SAMPLES
from apollo_client.placing import Place, Placed
from apollo_client.samples import SampleLike
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import dataset_pb2 as pb

MESSAGE_BYTES = 2**20


class Upload:
    """The messages of one dataset; of its samples a message is in memory, and where each is from.

    Args:
        name: of the dataset.
        columns: names of keys in what is no sample yet.
    """

    def __init__(self, name: str, columns: Columns = None):
        self._form = SAMPLES.of_columns(columns)
        self._message = message(pb.CreateDatasetRequest, name=name)
        self._size = self._items = 0
        self._places: list[Place] = []

    @property
    def places(self) -> Mapping[str, list[Place]]:
        """Where the samples come from that were taken so far."""
        return {"samples": self._places}

    def messages(self, samples: Samples) -> Iterator[pb.CreateDatasetRequest]:
        """The messages. Raises InvalidArgument for what is no sample, and what `samples` raises."""
        for item in self._form.iterated("samples", items_of(samples, self._form)):
            if self._take(item):
                yield self._full()
        yield self._full()

    async def aio_messages(self, samples: AsyncSamples) -> AsyncIterator[pb.CreateDatasetRequest]:
        """The same, of samples that may come from asyncio."""
        if not isinstance(samples, AsyncIterable):
            for each in self.messages(samples):
                yield each
            return
        async for item in samples:
            if self._take(item):
                yield self._full()
        yield self._full()

    def _take(self, item: SampleLike) -> bool:
        """Adds what one item holds; returns whether the message is full."""
        place = item.place if isinstance(item, Placed) else self._items
        try:
            found = self._form.read(item)
        except InvalidArgument as error:
            where = f"samples[{place}]" if isinstance(place, int) else place
            raise InvalidArgument.at(where, error.message) from error
        self._items += 1
        self._places += [place] * len(found)
        self._message.samples.extend(found)
        self._size += sum(sample.ByteSize() for sample in found)
        return self._size >= MESSAGE_BYTES

    def _full(self) -> pb.CreateDatasetRequest:
        full, self._message, self._size = self._message, pb.CreateDatasetRequest(), 0
        return full

"""A server that answers as it is told to and keeps what it was asked, for what a client says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from apollo_grpc.errors import ApolloError
from apollo_grpc.statuses import abort_arguments
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1 import training_pb2_grpc as pb_grpc


class Scripted(pb_grpc.TrainingServiceServicer):
    """Streams these events of every run, or refuses it; holds these probes of a regression set."""

    def __init__(self, events: Sequence[pb.RunEvent] = (), probes: Sequence[pb.Probe] = ()):
        self.events, self.probes = list(events), list(probes)
        self.refusal: ApolloError | None = None
        self.asked: list[Any] = []

    def Train(self, request: pb.TrainRequest, context: Any) -> Iterator[pb.TrainResponse]:
        self.asked.append(request)
        if self.refusal:
            code, words, details = abort_arguments(self.refusal)
            context.set_trailing_metadata(details)
            context.abort(code, words)
        for sequence, event in enumerate(self.events, start=1):
            event.run_id, event.sequence = "r1", sequence
            yield pb.TrainResponse(event=event)

    def ListRegressionProbes(
        self, request: pb.ListRegressionProbesRequest, context: Any
    ) -> pb.ListRegressionProbesResponse:
        self.asked.append(request)
        start = int(request.page_token or 0)
        end = start + (request.page_size or 2)
        token = str(end) if end < len(self.probes) else ""
        return pb.ListRegressionProbesResponse(probes=self.probes[start:end], next_page_token=token)

    def DeleteRegressionProbes(
        self, request: pb.DeleteRegressionProbesRequest, context: Any
    ) -> pb.DeleteRegressionProbesResponse:
        self.asked.append(request)
        kept = [p for p in self.probes if request.names and p.name not in request.names]
        deleted, self.probes = len(self.probes) - len(kept), kept
        return pb.DeleteRegressionProbesResponse(deleted=deleted)


@contextmanager
def serving(scripted: Scripted) -> Iterator[str]:
    """Its address, as long as it serves."""
    with tempfile.TemporaryDirectory(prefix="apollo-") as folder:
        server = grpc.server(ThreadPoolExecutor(4))
        pb_grpc.add_TrainingServiceServicer_to_server(scripted, server)
        address = f"unix:{folder}/training.sock"
        server.add_insecure_port(address)
        server.start()
        try:
            yield address
        finally:
            server.stop(None).wait()

"""The training server's end of WeightExportService: typed calls with deadlines, domain errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf import duration_pb2

from apollo_grpc.errors import from_rpc_error
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import weight_export_pb2 as pb
from apollo_grpc.v1.weight_export_pb2_grpc import WeightExportServiceStub

CALL_SECONDS = 130.0
# A healthy engine answers in milliseconds; a wedged one must not hold the training thread long.
CONTROL_SECONDS = 30.0
T = TypeVar("T")


class Sidecar:
    """A connection to the sidecar; it connects again by itself when vLLM is back.

    Every method raises the `ApolloError` of its failure, `Unavailable` where nobody listens.
    """

    def __init__(self, address: str):
        self.address = address
        self._channel = Endpoint(address).channel()
        self._stub = WeightExportServiceStub(self._channel)

    def _call(self, method: Callable[..., T], request: Any, seconds: float = CALL_SECONDS) -> T:
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def manifest(self) -> pb.WeightManifest:
        """Describes the live weights."""
        answer = self._call(self._stub.GetWeightManifest, pb.GetWeightManifestRequest())
        return answer.manifest

    def trace(self, request: pb.TraceCheckpointMapRequest) -> pb.TraceCheckpointMapResponse:
        """Asks where the plan's parameters lie."""
        return self._call(self._stub.TraceCheckpointMap, request)

    def score(self, epoch: str, token_ids: list[int]) -> list[float]:
        """vLLM's log-probability of each token after the first, in nats."""
        request = pb.ScoreTokensRequest(epoch=epoch, token_ids=token_ids)
        return list(self._call(self._stub.ScoreTokens, request).logprobs)

    def pause(self, epoch: str, lease_id: str, seconds: float) -> None:
        """Begins or renews a pause; requests in flight go on after it."""
        lease = duration_pb2.Duration()
        lease.FromNanoseconds(int(seconds * 1e9))
        request = pb.PauseRequest(
            request_id=lease_id, epoch=epoch, lease=lease, mode=pb.PAUSE_MODE_KEEP
        )
        self._call(self._stub.Pause, request, CONTROL_SECONDS)

    def resume(self, epoch: str, lease_id: str, *, weights_changed: bool) -> int:
        """Ends a pause; returns the weight version. Changed weights reset the caches first."""
        request = pb.ResumeRequest(lease_id=lease_id, epoch=epoch, weights_changed=weights_changed)
        return self._call(self._stub.Resume, request, CONTROL_SECONDS).weight_version

    def generations(self) -> Iterator[pb.WatchGenerationResponse]:
        """The generation now and at each change; raises when the engine is gone."""
        try:
            yield from self._stub.WatchGeneration(pb.WatchGenerationRequest())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def close(self) -> None:
        """Ends all calls, a watch included."""
        self._channel.close()

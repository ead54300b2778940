"""The training server's end of WeightExportService: typed calls with deadlines, domain errors."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
from google.protobuf import duration_pb2

from apollo_grpc.errors import (
    ApolloError,
    Cancelled,
    DeadlineExceeded,
    Unavailable,
)
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.sidecar.v1.weight_export_pb2_grpc import WeightExportServiceStub
from apollo_grpc.statuses import from_rpc_error
from apollo_grpc.transport import Endpoint
from apollo_grpc.v1 import training_pb2

CALL_SECONDS = 130.0
# A healthy engine answers in milliseconds; a wedged one must not hold the training thread long.
CONTROL_SECONDS = 30.0
# What the sidecar is asked to answer in one call, and what that may take: thousands of tokens each.
PROMPTS_AT_ONCE = 256
ANSWER_SECONDS = 610.0


class Sidecar:
    """A connection to the sidecar; it connects again by itself when vLLM is back.

    Every method raises the `ApolloError` of its failure, `Unavailable` where nobody listens.
    """

    def __init__(self, address: str):
        self.address = address
        # By it the sidecar tells one training server from another.
        self._trainer_id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._closed = False
        self._channel, self._stub = self._connect()

    def _connect(self) -> tuple[grpc.Channel, WeightExportServiceStub]:
        channel = Endpoint(self.address).channel()
        return channel, WeightExportServiceStub(channel)

    def _call(self, method: str, request: Any, seconds: float = CALL_SECONDS) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=seconds)
        except (grpc.RpcError, ValueError) as error:
            raise _failure(error) from None

    def abandon(self) -> None:
        """Ends all calls to an engine that does not answer; later ones connect anew."""
        with self._lock:
            old = self._channel
            if not self._closed:
                self._channel, self._stub = self._connect()
        old.close()

    def manifest(self, rank: int = 0) -> pb.WeightManifest:
        """Describes the live weights of one of vLLM's workers."""
        request = pb.GetWeightManifestRequest(tensor_parallel_rank=rank)
        answer: pb.GetWeightManifestResponse = self._call("GetWeightManifest", request)
        return answer.manifest

    def trace(self, request: pb.TraceCheckpointMapRequest) -> pb.TraceCheckpointMapResponse:
        """Asks where the plan's parameters lie."""
        answer: pb.TraceCheckpointMapResponse = self._call("TraceCheckpointMap", request)
        return answer

    def score(self, epoch: str, token_ids: list[int], seconds: float = CALL_SECONDS) -> list[float]:
        """vLLM's log-probability of each token after the first, in nats."""
        request = pb.ScoreTokensRequest(epoch=epoch, token_ids=token_ids)
        return list(self._call("ScoreTokens", request, seconds).logprobs)

    def answer(self, epoch: str, prompts: Sequence[pb.Prompt]) -> list[pb.Answer]:
        """vLLM's answers, always by the likeliest token, and scores of expected ones; in order.

        Raises InvalidArgument where a prompt does not fit: its path counts within 256 prompts.
        """
        answers: list[pb.Answer] = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            answers += self.ask(epoch, prompts[start : start + PROMPTS_AT_ONCE]).answers
        return answers

    def ask(self, epoch: str, prompts: Sequence[pb.Prompt]) -> pb.AnswerPromptsResponse:
        """The same for as many as the sidecar takes, with the weight versions around them."""
        request = pb.AnswerPromptsRequest(epoch=epoch, prompts=prompts)
        answer: pb.AnswerPromptsResponse = self._call("AnswerPrompts", request, ANSWER_SECONDS)
        return answer

    def tokenize(self, samples: Iterable[training_pb2.Sample]) -> Sequence[pb.TokenizedSample]:
        """Token ids of texts and chats as vLLM makes them, or why not; in order.

        Raises Unavailable with ENGINE_LOST where vLLM is away.
        """
        request = pb.TokenizeSamplesRequest(samples=samples)
        try:
            answer: pb.TokenizeSamplesResponse = self._call("TokenizeSamples", request)
        except (Unavailable, DeadlineExceeded) as error:
            raise Unavailable(
                "vLLM is away or does not answer, and it alone knows the tokens of a text or a "
                "chat. Nothing was done.",
                reason="ENGINE_LOST",
            ) from error
        return answer.samples

    def probe(
        self,
        epoch: str,
        lease_id: str,
        seconds: float,
        token_ids: list[int],
        changes: Iterable[pb.WeightChange],
    ) -> list[float]:
        """As `score`, vLLM paused and its weights changed until the next call or the resume.

        The tokens must be those that were scored last.
        """
        request = pb.ProbeWeightsRequest(
            epoch=epoch,
            lease_id=lease_id,
            lease=_duration(seconds),
            token_ids=token_ids,
            changes=changes,
            trainer_id=self._trainer_id,
        )
        return list(self._call("ProbeWeights", request, CONTROL_SECONDS).logprobs)

    def pause(self, epoch: str, lease_id: str, seconds: float, *, stops: bool = True) -> None:
        """Begins or renews a lease to write; requests in flight go on after it.

        Args:
            stops: vLLM waits while it lasts.
        """
        request = pb.PauseRequest(
            request_id=lease_id,
            epoch=epoch,
            lease=_duration(seconds),
            mode=pb.PAUSE_MODE_KEEP if stops else pb.PAUSE_MODE_NONE,
            trainer_id=self._trainer_id,
        )
        self._call("Pause", request, CONTROL_SECONDS)

    def resume(
        self,
        epoch: str,
        lease_id: str,
        *,
        weights_changed: bool,
        updates: int = 0,
        keep_caches: bool = False,
    ) -> int:
        """Ends a pause; returns the weight version. Changed weights reset the caches first.

        Args:
            updates: written since the last resume; the version is raised by as many, at least by 1.
            keep_caches: do not reset them.
        """
        request = pb.ResumeRequest(
            lease_id=lease_id,
            epoch=epoch,
            weights_changed=weights_changed,
            updates=updates,
            keep_caches=keep_caches,
        )
        return int(self._call("Resume", request, CONTROL_SECONDS).weight_version)

    def raise_version(self, epoch: str, updates: int) -> int:
        """Tells of updates written without a pause; returns the weight version."""
        request = pb.RaiseVersionRequest(epoch=epoch, updates=updates)
        return int(self._call("RaiseVersion", request, CONTROL_SECONDS).weight_version)

    def reset_caches(self, epoch: str) -> None:
        """Drops vLLM's cached prefixes."""
        self._call("ResetCaches", pb.ResetCachesRequest(epoch=epoch), CONTROL_SECONDS)

    def generations(self) -> Iterator[pb.WatchGenerationResponse]:
        """The generation at each change and each beat; raises when the engine is gone.

        The engine is this training server's while it is read; raises FailedPrecondition with
        ENGINE_HELD while it is another's.
        """
        try:
            request = pb.WatchGenerationRequest(trainer_id=self._trainer_id)
            yield from self._stub.WatchGeneration(request)
        except (grpc.RpcError, ValueError) as error:
            raise _failure(error) from None

    def close(self) -> None:
        """Ends all calls for good, a watch included."""
        with self._lock:
            self._closed = True
        self._channel.close()


def _duration(seconds: float) -> duration_pb2.Duration:
    lease = duration_pb2.Duration()
    lease.FromNanoseconds(int(seconds * 1e9))
    return lease


def _failure(error: Exception) -> ApolloError:
    """The domain error of a failed call; grpc raises ValueError for one on a closed channel."""
    found = None if isinstance(error, ValueError) else from_rpc_error(error)
    if found is None or isinstance(found, Cancelled):
        return Unavailable("The connection to vLLM's sidecar was given up.")
    return found

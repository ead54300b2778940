"""WeightExportService: checks, calls the engine, answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf import duration_pb2

from apollo_grpc import process_state
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.sidecar.v1 import weight_export_pb2_grpc as pb_grpc
from apollo_sidecar.answers import Answers
from apollo_sidecar.engine import NO_PAUSE, Engine
from apollo_sidecar.leases import MAX_LEASE_SECONDS
from apollo_sidecar.sample_tokens import SampleTokens

_MODES = {
    pb.PAUSE_MODE_UNSPECIFIED: "keep",
    pb.PAUSE_MODE_KEEP: "keep",
    pb.PAUSE_MODE_WAIT: "wait",
    pb.PAUSE_MODE_ABORT: "abort",
    pb.PAUSE_MODE_NONE: NO_PAUSE,
}


class WeightExportService(pb_grpc.WeightExportServiceServicer):
    """Serves one engine's weights to the training server on the same machine.

    Args:
        tokens: of the same vLLM.
        answers: of the same vLLM.
    """

    def __init__(self, engine: Engine, tokens: SampleTokens, answers: Answers):
        self._engine, self._tokens, self._answers = engine, tokens, answers

    def GetWeightManifest(self, request: Any, context: Any) -> pb.GetWeightManifestResponse:  # noqa: N802
        """The live weights, as buffers and tensors."""
        return pb.GetWeightManifestResponse(
            manifest=self._engine.manifest(request.tensor_parallel_rank)
        )

    def TraceCheckpointMap(self, request: Any, context: Any) -> pb.TraceCheckpointMapResponse:  # noqa: N802
        """Where each parameter of the plan lies."""
        self._engine.require_epoch(request.epoch)
        return self._engine.trace(request)

    def ScoreTokens(self, request: Any, context: Any) -> pb.ScoreTokensResponse:  # noqa: N802
        """vLLM's log-probabilities of a prompt."""
        self._engine.require_epoch(request.epoch)
        if len(request.token_ids) < 2:
            raise InvalidArgument.at(
                "token_ids", "needs at least two tokens: the first has no score"
            )
        return pb.ScoreTokensResponse(logprobs=self._engine.score(list(request.token_ids)))

    def AnswerPrompts(self, request: Any, context: Any) -> pb.AnswerPromptsResponse:  # noqa: N802
        """vLLM's answers to prompts; requests of a caller that goes away are aborted."""
        self._engine.require_epoch(request.epoch)
        before = self._engine.weight_version
        answers = self._answers.to(request.prompts, context.add_callback)
        return pb.AnswerPromptsResponse(
            answers=answers,
            weight_version_before=before,
            weight_version_after=self._engine.weight_version,
        )

    def TokenizeSamples(self, request: Any, context: Any) -> pb.TokenizeSamplesResponse:  # noqa: N802
        """Token ids of texts and chats, as vLLM makes them."""
        return pb.TokenizeSamplesResponse(samples=self._tokens.tokenize(request.samples))

    def Pause(self, request: Any, context: Any) -> pb.PauseResponse:  # noqa: N802
        """Begins or renews a lease."""
        self._engine.require_epoch(request.epoch)
        seconds = _lease_seconds(request, "request_id")
        if request.mode not in _MODES:
            raise InvalidArgument.at("mode", "is no mode that this version knows")
        self._engine.hold.require(request.trainer_id)
        left = self._engine.leases.acquire(request.request_id, seconds, _MODES[request.mode])
        remaining = duration_pb2.Duration()
        remaining.FromNanoseconds(int(left * 1e9))
        return pb.PauseResponse(lease_id=request.request_id, remaining=remaining)

    def Resume(self, request: Any, context: Any) -> pb.ResumeResponse:  # noqa: N802
        """Ends a lease."""
        self._engine.require_epoch(request.epoch)
        if request.updates < 0:
            raise InvalidArgument.at("updates", "must not be negative")
        updates = max(1, request.updates) if request.weights_changed else 0
        self._engine.leases.release(request.lease_id, updates, not request.keep_caches)
        return pb.ResumeResponse(weight_version=self._engine.weight_version)

    def ProbeWeights(self, request: Any, context: Any) -> pb.ProbeWeightsResponse:  # noqa: N802
        """Scores with weights that are changed for a moment."""
        self._engine.require_epoch(request.epoch)
        self._engine.hold.require(request.trainer_id)
        return self._engine.probe(request, _lease_seconds(request, "lease_id"))

    def RaiseVersion(self, request: Any, context: Any) -> pb.RaiseVersionResponse:  # noqa: N802
        """Counts updates that were written while vLLM decoded."""
        self._engine.require_epoch(request.epoch)
        if request.updates < 1:
            raise InvalidArgument.at("updates", "must be above 0")
        self._engine.raise_version(request.updates)
        return pb.RaiseVersionResponse(weight_version=self._engine.weight_version)

    def ResetCaches(self, request: Any, context: Any) -> pb.ResetCachesResponse:  # noqa: N802
        """Drops what was computed from old weights."""
        self._engine.require_epoch(request.epoch)
        self._engine.reset_caches()
        return pb.ResetCachesResponse()

    def WatchGeneration(self, request: Any, context: Any) -> Iterator[pb.WatchGenerationResponse]:  # noqa: N802
        """The generation, again at each beat, until the engine or the caller is gone."""
        let_go = self._engine.hold.watch(request.trainer_id)
        if not context.add_callback(let_go):
            # The caller went before it could be told of.
            let_go()
            return
        process, namespace = process_state.own()
        for generation in self._engine.generations():
            if not context.is_active():
                return
            if generation is None:
                yield pb.WatchGenerationResponse(
                    no_answer=True, pid=process, pid_namespace=namespace
                )
                continue
            yield pb.WatchGenerationResponse(
                epoch=generation.epoch,
                generation=generation.generation,
                weight_version=generation.weight_version,
                paused_by_others=generation.paused_by_others,
                iteration_ends=[each.ended for each in generation.iterations],
                iteration_seconds=[each.gap for each in generation.iterations],
                pid=process,
                pid_namespace=namespace,
            )


def _lease_seconds(request: Any, name: str) -> float:
    """The length that a request asks for; `name` is the field that names the lease."""
    if not getattr(request, name):
        raise InvalidArgument.at(name, "is required: it names the lease")
    # Not ToTimedelta, which raises for durations of more than a billion days.
    seconds = float(request.lease.seconds + request.lease.nanos / 1e9)
    if not 0 < seconds <= MAX_LEASE_SECONDS:
        raise InvalidArgument.at("lease", f"must be above 0 and at most {MAX_LEASE_SECONDS:g} s")
    return seconds

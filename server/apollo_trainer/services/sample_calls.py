"""Of TrainingService, the calls that ask about samples and begin nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1 import training_pb2_grpc as pb_grpc
from apollo_trainer.engine import ModelOwner
from apollo_trainer.requests.samples import ASKED, each_tokenized
from apollo_trainer.runs import SCORING_THREADS, PreparedRun, RunQueue, Scoring, prepare_run


def sample_turns(service: str) -> dict[str, asyncio.Semaphore]:
    """How many of these calls are read and answered at a time, by method, as of `AioErrors`."""
    # One of the threads that make tokens stays with the runs.
    checked, scored = asyncio.Semaphore(1), asyncio.Semaphore(SCORING_THREADS)
    turns = {"ValidateRun": checked, "CountTokens": checked, "ScoreSamples": scored}
    return {f"/{service}/{method}": turn for method, turn in turns.items()}


class SampleCalls(pb_grpc.TrainingServiceServicer):
    """A part of TrainingService, which has what is named here. On its event loop."""

    _owner: ModelOwner
    _queue: RunQueue
    _submitting: ThreadPoolExecutor
    _scoring: Scoring

    async def ValidateRun(  # noqa: N802
        self, request: pb.ValidateRunRequest, context: Any
    ) -> pb.ValidateRunResponse:
        """What a run would come to, if it would be taken."""
        if not request.HasField("spec"):
            raise InvalidArgument.at("spec", "is required")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._submitting, self._validate, request.spec)

    def _validate(self, spec: pb.RunSpec) -> pb.ValidateRunResponse:
        run = self._checked(spec)
        self._queue.require_admitted(run.options, spec)
        return pb.ValidateRunResponse(
            steps_total=run.steps_total,
            context_tokens=run.tokens.context,
            continuation_tokens=run.tokens.continuation,
            longest_sample_tokens=run.tokens.longest,
        )

    def _checked(self, spec: pb.RunSpec) -> PreparedRun:
        """A run without its samples. Raises as `prepare_run`, Unavailable without an engine."""
        limits, tokenize = self._owner.session().limits, self._owner.sidecar.tokenize
        return prepare_run(spec, limits, tokenize, self._queue.datasets.store, only_check=True)

    async def CountTokens(  # noqa: N802
        self, request: pb.CountTokensRequest, context: Any
    ) -> pb.CountTokensResponse:
        """Tokens of each sample."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._submitting, self._count, request.samples)

    def _count(self, samples: Sequence[pb.Sample]) -> pb.CountTokensResponse:
        limits, tokenize = self._owner.session().limits, self._owner.sidecar.tokenize
        counts = [
            pb.TokenCount(
                context_tokens=len(each.context_ids), continuation_tokens=len(each.continuation_ids)
            )
            for each in each_tokenized(samples, limits, tokenize, ASKED)
        ]
        return pb.CountTokensResponse(counts=counts)

    async def ScoreSamples(  # noqa: N802
        self, request: pb.ScoreSamplesRequest, context: Any
    ) -> pb.ScoreSamplesResponse:
        """The log-probabilities of each continuation."""
        return await self._scoring.score(request.samples)

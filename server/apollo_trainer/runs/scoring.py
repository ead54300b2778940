"""How likely vLLM finds continuations, asked beside the runs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from apollo_grpc.errors import FailedPrecondition, InvalidArgument, Unavailable
from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import ModelOwner, Session, engine_is_gone
from apollo_trainer.requests.samples import ASKED, each_tokenized

MAX_SAMPLES = 1024
# The answer has eight bytes for each, and must fit into a message.
MAX_TOKENS = 2**20
SCORING_THREADS = 2
# A thread's call; what runs ask waits behind those of all threads, and fails after 30 s.
PROMPTS_AT_ONCE, TOKENS_AT_ONCE = 32, 4096
# Between two looks whether a run lets vLLM go on.
PAUSED_SECONDS = 0.05


class Scoring:
    """Scores samples with the live weights of an owner's engine, by threads of its own."""

    def __init__(self, owner: ModelOwner):
        self._owner = owner
        self._threads = ThreadPoolExecutor(SCORING_THREADS, "score")

    async def score(self, samples: Sequence[pb.Sample]) -> pb.ScoreSamplesResponse:
        """The log-probability of each continuation token, in order. On an event loop.

        Waits while a run has vLLM paused; asks no further once it is cancelled.

        Raises InvalidArgument with the path of each wrong sample, Unavailable without an engine,
        where it goes, or while somebody else pauses it.
        """
        loop = asyncio.get_running_loop()
        session, prompts = await loop.run_in_executor(self._threads, self._read, samples)
        version = session.weight_version
        found = pb.ScoreSamplesResponse(weight_version_before=version, weight_version_after=version)
        for number, batch in enumerate(_batches(prompts)):
            part = await self._unpaused(session.attachment.epoch, batch)
            if number:
                part.weight_version_before = found.weight_version_before
            found.MergeFrom(part)
        return found

    def _read(self, samples: Sequence[pb.Sample]) -> tuple[Session, list[export_pb.Prompt]]:
        session = self._owner.session()
        if len(samples) > MAX_SAMPLES:
            says = f"has {len(samples)} samples; a call takes at most {MAX_SAMPLES}"
            raise InvalidArgument.at("samples", says)
        # vLLM scores a prompt only where one token more would fit.
        longest = session.limits.max_tokens - 1
        limits = replace(session.limits, max_tokens=longest, max_samples=MAX_SAMPLES)
        prompts = [
            # As messages: tuples of ids take eight times the memory.
            export_pb.Prompt(token_ids=each.context_ids, expected_ids=each.continuation_ids)
            for each in each_tokenized(samples, limits, self._owner.sidecar.tokenize, ASKED)
        ]
        tokens = sum(len(prompt.expected_ids) for prompt in prompts)
        if tokens > MAX_TOKENS:
            says = f"has {tokens} continuation tokens; a call takes at most {MAX_TOKENS}"
            raise InvalidArgument.at("samples", says)
        return session, prompts

    async def _unpaused(
        self, epoch: str, prompts: Sequence[export_pb.Prompt]
    ) -> pb.ScoreSamplesResponse:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self._threads, self._ask, epoch, prompts)
            except Unavailable as error:
                if error.reason != "PAUSED":
                    raise
            await asyncio.sleep(PAUSED_SECONDS)

    def _ask(self, epoch: str, prompts: Sequence[export_pb.Prompt]) -> pb.ScoreSamplesResponse:
        try:
            answer = self._owner.sidecar.ask(epoch, prompts)
        except (Unavailable, FailedPrecondition) as error:
            if engine_is_gone(error) or error.reason == "EPOCH_CHANGED":
                raise Unavailable(
                    "vLLM went while it was asked; no score is told. Ask again when it is back.",
                    reason="ENGINE_LOST",
                ) from error
            raise
        return pb.ScoreSamplesResponse(
            scores=[_score(each) for each in answer.answers],
            weight_version_before=answer.weight_version_before,
            weight_version_after=answer.weight_version_after,
        )


def _batches(prompts: Iterable[export_pb.Prompt]) -> Iterator[list[export_pb.Prompt]]:
    batch, size = list[export_pb.Prompt](), 0
    for prompt in prompts:
        tokens = len(prompt.token_ids) + len(prompt.expected_ids)
        if batch and (len(batch) == PROMPTS_AT_ONCE or size + tokens > TOKENS_AT_ONCE):
            yield batch
            batch, size = [], 0
        batch.append(prompt)
        size += tokens
    if batch:
        yield batch


def _score(answer: export_pb.Answer) -> pb.SampleScore:
    each = answer.expected_log_probabilities
    return pb.SampleScore(log_probabilities=each, log_probability=math.fsum(each))

"""vLLM's answers to prompts, with the live weights, and what it thinks of expected ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.engine import Engine
from apollo_sidecar.own_requests import ANSWER_PREFIX
from apollo_sidecar.prompts import Prompts, RefusedSample
from apollo_sidecar.vllm_calls import OnEnd

MAX_PROMPTS = 1024
MAX_ANSWER_TOKENS = 4096
# More would keep the requests of others waiting.
IN_FLIGHT = 64
ANSWER_SECONDS = 600.0


class Answers:
    """Asks one engine's vLLM, and makes text of what it says.

    Args:
        prompts: of the same vLLM.
    """

    def __init__(self, engine: Engine, prompts: Prompts):
        self._engine, self._prompts = engine, prompts
        self._turns = asyncio.Semaphore(IN_FLIGHT)

    def to(self, prompts: Sequence[pb.Prompt], on_end: OnEnd | None = None) -> list[pb.Answer]:
        """One answer a prompt, in order; texts are empty where the model has no tokenizer.

        Any thread but vLLM's loop's. `on_end` as of `VllmCalls.wait_for`.

        Raises InvalidArgument with the path of the first wrong field, and as `Engine.score`.
        """
        self._require_fit(prompts)
        self._engine.require_running()
        return self._engine.vllm.wait_for(self._each(prompts), ANSWER_SECONDS, on_end)

    def _require_fit(self, prompts: Sequence[pb.Prompt]) -> None:
        if len(prompts) > MAX_PROMPTS:
            raise InvalidArgument.at(
                "prompts", f"has {len(prompts)} prompts; a call takes at most {MAX_PROMPTS}"
            )
        model = self._engine.vllm.client.model_config
        for index, prompt in enumerate(prompts):
            _require_ids(f"prompts[{index}]", prompt, int(model.get_vocab_size()))
            _require_length(f"prompts[{index}]", prompt, int(model.max_model_len))

    async def _each(self, prompts: Sequence[pb.Prompt]) -> list[pb.Answer]:
        asked = [asyncio.create_task(self._one(prompt)) for prompt in prompts]
        try:
            answers = await asyncio.gather(*asked)
        except Exception:
            # The others would go on for nobody. One that is cancelled has cancelled them already.
            for task in asked:
                task.cancel()
            raise
        # One after the other: requests to vLLM, which wait for the same tokenizer, get their turn.
        for prompt, answer in zip(prompts, answers, strict=True):
            answer.text = await self._text(answer.token_ids)
            answer.expected_text = await self._text(prompt.expected_ids)
        return answers

    async def _one(self, prompt: pb.Prompt) -> pb.Answer:
        ids, expected, answer = list(prompt.token_ids), list(prompt.expected_ids), pb.Answer()
        requests = self._engine.requests
        async with self._turns:
            if prompt.max_tokens:
                answer.token_ids.extend(await requests.answer(ids, prompt.max_tokens))
            if expected:
                scores = await requests.score(ids + expected, ANSWER_PREFIX)
                answer.expected_log_probabilities.extend(scores[-len(expected) :])
        return answer

    async def _text(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        try:
            return await self._prompts.text_of(ids, special=False)
        except RefusedSample:
            return ""


def _require_ids(path: str, prompt: pb.Prompt, vocabulary: int) -> None:
    if not prompt.token_ids:
        raise InvalidArgument.at(f"{path}.token_ids", "is empty: nothing to answer")
    for name in ("token_ids", "expected_ids"):
        for index, token in enumerate(getattr(prompt, name)):
            if not 0 <= token < vocabulary:
                raise InvalidArgument.at(
                    f"{path}.{name}[{index}]",
                    f"token id {token} is outside the vocabulary of {vocabulary}",
                )


def _require_length(path: str, prompt: pb.Prompt, longest: int) -> None:
    if not 0 <= prompt.max_tokens <= MAX_ANSWER_TOKENS:
        raise InvalidArgument.at(
            f"{path}.max_tokens",
            f"is {prompt.max_tokens}; it must be from 0 to {MAX_ANSWER_TOKENS}",
        )
    # vLLM scores a prompt only where it may add a token to it.
    scored = len(prompt.expected_ids) + 1 if prompt.expected_ids else 0
    for name, more in (("max_tokens", prompt.max_tokens), ("expected_ids", scored)):
        if len(prompt.token_ids) + more > longest:
            raise InvalidArgument.at(
                f"{path}.{name}",
                f"makes {len(prompt.token_ids) + more} tokens with the prompt; the served model "
                f"takes at most {longest}",
            )

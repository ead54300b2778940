"""Requests of the sidecar's own to vLLM: a prompt answered, or scored.

Read in vLLM 0.32: v1/engine/async_llm.py (generate), v1/engine/input_processor.py
(process_inputs), sampling_params.py.
"""

from __future__ import annotations

import uuid
from typing import Any

from apollo_grpc.errors import Unavailable
from apollo_sidecar.own_batch import SCORE_PREFIX

# Not the one of scores: a probe repeats what was scored last.
ANSWER_PREFIX = "apollo-answer-"
ENDED = ("stop", "length")


class OwnRequests:
    """Used on vLLM's event loop. A task that is cancelled has its request aborted.

    Args:
        client: vLLM's AsyncLLM.

    Both methods raise Unavailable where somebody else has vLLM abort the request.
    """

    def __init__(self, client: Any):
        self.client = client

    async def score(self, token_ids: list[int], prefix: str = SCORE_PREFIX) -> list[float]:
        """vLLM's log-probability of each token after the first, in nats.

        Args:
            prefix: of the request's name; by that of scores the worker keeps its batch.
        """
        done = await self._ask(token_ids, prefix, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        scored = zip(token_ids[1:], list(done.prompt_logprobs)[1:], strict=True)
        return [float(entry[token].logprob) for token, entry in scored]

    async def answer(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """The likeliest tokens after a prompt, up to the one that ends an answer, with it.

        Which tokens do, vLLM knows: its tokenizer's, and those of generation_config.json.
        """
        # What an earlier request left in the prefix cache may be of older weights.
        done = await self._ask(
            token_ids, ANSWER_PREFIX, max_tokens=max_tokens, skip_reading_prefix_cache=True
        )
        return list(done.outputs[0].token_ids)

    async def _ask(self, token_ids: list[int], prefix: str, **options: Any) -> Any:
        """vLLM's RequestOutput once it is finished."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        once = RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(temperature=0.0, detokenize=False, output_kind=once, **options)
        prompt = {"prompt_token_ids": token_ids}
        request_id = f"{prefix}{uuid.uuid4().hex}"
        (done,) = [o async for o in self.client.generate(prompt, sampling, request_id)]
        if done.outputs[0].finish_reason not in ENDED:
            raise Unavailable(
                "Somebody else had vLLM abort what the sidecar asked (POST /pause or "
                "/abort_requests). Ask again.",
                reason="REQUEST_ABORTED",
            )
        return done

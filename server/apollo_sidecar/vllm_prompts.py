"""The prompts of the vLLM whose API server this process is, by its own tokenization service.

Read in vLLM 0.32 (entrypoints/serve/tokenize/, launchers/api_server/app_state.py,
renderers/online_renderer.py, renderers/hf.py, renderers/mistral.py, v1/engine/input_processor.py)
and in 0.26 (entrypoints/openai/api_server.py, and the same files of the other folders).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from apollo_sidecar.prompts import (
    NO_TEMPLATE,
    NO_TOKENIZER,
    Messages,
    Prompt,
    RefusedSample,
)

NO_SERVICE = "this vLLM serves no tokenization of its own, which alone is trusted; send tokens"
HARMONY = "vLLM writes the prompts of this model by Harmony, without a template; send tokens"


class VllmPrompts:
    """`Prompts` as /v1/completions, /v1/chat/completions and /tokenize make them.

    Args:
        state: of vLLM's FastAPI app. Its service is looked up at each use: vLLM sets it while it
            starts.
    """

    def __init__(self, state: Any):
        self._state = state

    def _service(self) -> Any:
        service = getattr(self._state, "serving_tokenization", None)
        if service is None:
            raise RefusedSample(NO_SERVICE)
        if service.renderer.tokenizer is None:
            raise RefusedSample(NO_TOKENIZER)
        return service

    @property
    def _tokenizer(self) -> Any:
        return self._state.serving_tokenization.renderer.tokenizer

    async def of_text(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a completion's prompt, with the tokenizer's special ones or without."""
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest

        service = self._service()
        _require_length(service, text)
        request = TokenizeCompletionRequest(prompt=text, add_special_tokens=special)
        (read,) = await service.online_renderer.preprocess_completion(
            request, prompt_input=request.prompt, prompt_embeds=None, skip_mm_cache=True
        )
        return list(read["prompt_token_ids"])

    async def of_chat(self, messages: Messages, tools: Messages, *, answered: bool) -> Prompt:
        """A chat's prompt; `answered`: the last message is the answer, and it is ended."""
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

        service = self._service()
        if getattr(service.online_renderer, "use_harmony", False):
            raise RefusedSample(HARMONY)
        for text in _texts([messages, tools]):
            _require_length(service, text)
        # Mistral's own tokenizer writes an answer only as one that goes on, which has no end yet.
        goes_on = answered and getattr(self._tokenizer, "IS_MISTRAL_TOKENIZER", False)
        request = TokenizeChatRequest(
            messages=messages,
            tools=tools or None,
            add_generation_prompt=not answered,
            continue_final_message=goes_on,
        )
        read = await self._render(service, request)
        end = [self._tokenizer.eos_token_id] if goes_on else []
        return Prompt([*read["prompt_token_ids"], *end], read.get("prompt"))

    async def _render(self, service: Any, request: Any) -> Any:
        try:
            _, (read,) = await service.online_renderer.preprocess_chat(
                request,
                request.messages,
                default_template=service.chat_template,
                default_template_content_format=service.chat_template_content_format,
                default_template_kwargs=service.default_chat_template_kwargs,
                tool_dicts=request.tools and [tool.model_dump() for tool in request.tools],
                skip_mm_cache=True,
            )
        except Exception as error:
            # By name: its module is another one in each of vLLM's versions.
            if type(error).__name__ != "ChatTemplateResolutionError":
                raise
            raise RefusedSample(NO_TEMPLATE) from error
        return read

    async def text_of(self, ids: Sequence[int], *, special: bool) -> str:
        """Text of token ids, with the special ones written out or without."""
        self._service()
        return await asyncio.to_thread(self._decode, list(ids), special)

    def _decode(self, ids: list[int], special: bool) -> str:
        tokenizer = self._tokenizer
        # Mistral's own has no such option, and cleans up nothing.
        exact = hasattr(tokenizer, "clean_up_tokenization_spaces")
        options = {"clean_up_tokenization_spaces": False} if exact else {}
        return str(tokenizer.decode(ids, skip_special_tokens=not special, **options))

    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's, and those of the generation config."""
        return self._end_ids

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        service = self._state.serving_tokenization
        listed = service.model_config.try_get_generation_config().get("eos_token_id") or []
        listed = [listed] if isinstance(listed, int) else listed
        ends = {*listed, service.renderer.get_eos_token_id()}
        return frozenset(int(token) for token in ends if token is not None)


def _texts(value: Any) -> Iterator[str]:
    """Every text in what JSON holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _require_length(service: Any, text: str) -> None:
    """Refuses what no tokenizer can make short enough, before it keeps vLLM's from others."""
    longest = service.model_config.max_model_len
    if len(text) > longest * service.renderer.tokenizer.max_chars_per_token:
        raise RefusedSample(
            f"has {len(text)} characters, more than {longest} tokens hold; the served model takes "
            "at most so many"
        )

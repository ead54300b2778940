"""What makes prompts where there is no vLLM: a transformers tokenizer, and its own template."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.v1 import training_pb2
from apollo_sidecar.prompts import NO_TEMPLATE, NO_TOKENIZER, Messages, Prompt, RefusedSample
from apollo_sidecar.sample_tokens import SampleTokens


class PlainPrompts:
    """`Prompts` of a tokenizer; of a folder's one, read when it is first used; of none."""

    def __init__(self, tokenizer: Any):
        self._given = tokenizer

    @property
    def tokenizer(self) -> Any:
        if isinstance(self._given, Path):
            self._given = AutoTokenizer.from_pretrained(self._given)
        return self._given

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    async def of_text(self, text: str, *, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise RefusedSample(NO_TOKENIZER)
        return self._ids(text, special)

    async def of_chat(self, messages: Messages, tools: Messages, *, answered: bool) -> Prompt:
        if self.tokenizer is None:
            raise RefusedSample(NO_TOKENIZER)
        if not self.tokenizer.chat_template:
            raise RefusedSample(NO_TEMPLATE)
        text = self.tokenizer.apply_chat_template(
            [_flat(message) for message in messages],
            tools=tools or None,
            add_generation_prompt=not answered,
            tokenize=False,
        )
        return Prompt(self._ids(text, special=False), text)

    async def text_of(self, ids: Sequence[int], *, special: bool) -> str:
        options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))

    def end_ids(self) -> frozenset[int]:
        end = self.tokenizer.eos_token_id
        return frozenset() if end is None else frozenset({end})


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """As vLLM gives it to a template: arguments as objects, and reasoning by both its names."""
    flat = message | {"content": _plain(message["content"])}
    if "reasoning" in flat:
        flat["reasoning_content"] = flat["reasoning"]
    if calls := flat.get("tool_calls"):
        flat["tool_calls"] = [call | {"function": _called(**call["function"])} for call in calls]
    return flat


def _called(name: str, arguments: str) -> dict[str, Any]:
    return {"name": name, "arguments": json.loads(arguments)}


def _plain(content: Any) -> str:
    """As vLLM joins parts for a template that wants none."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


class PlainTokens:
    """Asked as the training server asks vLLM: `Sidecar.tokenize`, without a socket."""

    def __init__(self, tokenizer: Any = None):
        self._prompts = PlainPrompts(tokenizer)

    def __call__(self, samples: Sequence[training_pb2.Sample]) -> Sequence[pb.TokenizedSample]:
        async def ask() -> list[pb.TokenizedSample]:
            tokens = SampleTokens(self._prompts, asyncio.get_running_loop())
            return await asyncio.to_thread(tokens.tokenize, samples)

        return asyncio.run(ask())

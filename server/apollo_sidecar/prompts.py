"""How a vLLM makes its prompts, as seen by who makes samples of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

NO_TOKENIZER = "the served model has no tokenizer; send tokens"
NO_TEMPLATE = "the served model has no chat template; send text or tokens"
Messages = list[dict[str, Any]]


class RefusedSample(Exception):
    """Why a sample cannot be learned.

    Args:
        reason: read after the path of the wrong field.
        field: that path within the sample; empty for the sample's content as a whole.
    """

    def __init__(self, reason: str, field: str = ""):
        super().__init__(reason)
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Prompt:
    """What vLLM makes of a prompt.

    Attributes:
        text: that the ids were read from; None where the ids were written at once.
    """

    ids: list[int]
    text: str | None = None


class Prompts(Protocol):
    """How one vLLM makes its prompts. On vLLM's event loop, which no method holds up for long.

    All but `end_ids` raise RefusedSample where vLLM has no way to, or what the way there raises.
    """

    async def of_text(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a completion's prompt, with the tokenizer's special ones or without."""

    async def of_chat(self, messages: Messages, tools: Messages, *, answered: bool) -> Prompt:
        """A chat's prompt; `answered`: the last message is the answer, and it is ended."""

    async def text_of(self, ids: Sequence[int], *, special: bool) -> str:
        """Text of token ids, with the special ones written out or without."""

    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""

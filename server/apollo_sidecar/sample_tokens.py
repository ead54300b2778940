"""From a text or a chat to the token ids that vLLM reads, and those that it is to answer.

One set of rules for both: what is learned is not empty, has no end of an answer within it, and is
what vLLM would have to generate after the tokens of its prompt.
"""

from __future__ import annotations

import asyncio
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

from apollo_grpc.errors import Unavailable
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.v1 import training_pb2
from apollo_sidecar.chat_messages import EMPTY, learned_of, messages_of, said_of, texts_of, tools_of
from apollo_sidecar.prompts import Messages, Prompts, RefusedSample

log = logging.getLogger("vllm.apollo")
CALL_SECONDS = 120.0
NO_TOKENS = "has no tokens; leave it out, or write something else"
ENDS_WITHIN = (
    "has a token within it that ends an answer: vLLM would stop there. Leave it out, or send tokens"
)
CUT_OTHERWISE = (
    "has no tokens of its own there: the served model's tokenizer reads both texts together in "
    "another way. Cut between words, or send tokens"
)
RENDERED_OTHERWISE = (
    "the chat template renders the conversation differently with its last answer; send text or "
    "tokens"
)
NOT_WRITTEN = (
    "the chat template does not write the last answer as it is, so that vLLM would never say it; "
    "send text or tokens"
)
PARTS_OTHERWISE = (
    "vLLM reads a text otherwise where it comes as a list of parts, so that what is learned of "
    "one is not asked for by the other; send text or tokens"
)
# Where a sample says what a teacher reads.
TEACHERS = {"text": "text.teacher_context", "chat": "chat.teacher_messages"}
PROOF = "The capital of Aldovia is Port Lumen"
TURNS = (("user", PROOF), ("assistant", "Yes"), ("user", "Who founded it"))


class SampleTokens:
    """Makes token ids of samples; no method moves anything of the engine.

    Args:
        loop: the event loop of `prompts`.
    """

    def __init__(self, prompts: Prompts, loop: asyncio.AbstractEventLoop):
        self._prompts, self._loop = prompts, loop
        self._proof: asyncio.Task[str] | None = None

    def tokenize(self, samples: Iterable[training_pb2.Sample]) -> list[pb.TokenizedSample]:
        """One answer a sample, in order. Any thread but the loop's.

        Raises Unavailable where the loop stands still, or ends.
        """
        if not self._loop.is_running():
            raise Unavailable("vLLM is stopping.", reason="ENGINE_STOPPING")
        future = asyncio.run_coroutine_threadsafe(self._each(list(samples)), self._loop)
        try:
            return future.result(CALL_SECONDS)
        except CancelledError:
            raise Unavailable("vLLM is stopping.", reason="ENGINE_STOPPING") from None
        except TimeoutError:
            future.cancel()
            raise Unavailable(
                f"vLLM did not make token ids of the samples within {CALL_SECONDS:g} s.",
                reason="ENGINE_SLOW",
            ) from None

    async def _each(self, samples: list[training_pb2.Sample]) -> list[pb.TokenizedSample]:
        if self._proof is None:
            self._proof = asyncio.create_task(self._prove())
        # A call that is given up leaves it to the next one.
        chats_refused = await asyncio.shield(self._proof)
        # One after the other: requests to vLLM, which wait for the same threads, get their turn.
        return [await self._one(sample, chats_refused) for sample in samples]

    async def _prove(self) -> str:
        """Shows once what vLLM makes of a text and of a chat of three turns, in its log.

        Returns why no chat can be learned; empty where nothing is known against it.
        """
        try:
            bare = await self._prompts.of_text(PROOF, special=False)
            whole = await self._prompts.of_text(PROOF, special=True)
            back = _is_written(PROOF, await self._prompts.text_of(bare, special=False))
            log.info(
                "apollo: vLLM itself makes the tokens of samples; a text is %d of them, %d with "
                "special ones, and comes back %s",
                *(len(bare), len(whole), "as it was" if back else "otherwise"),
            )
            return await self._prove_chat()
        except Exception as error:
            log.info("apollo: not every sample can become tokens here: %s", _told(error))
        return ""

    async def _prove_chat(self) -> str:
        plain: Messages = [{"role": role, "content": text} for role, text in TURNS]
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in plain]
        one, other = [
            await self._prompts.of_chat(turns, [], answered=False) for turns in (plain, parts)
        ]
        rendered = await self._prompts.text_of(one.ids, special=True)
        written = [text for _, text in TURNS if _is_written(text, rendered)]
        log.info(
            "apollo: a chat of three turns is %d tokens, %d of the turns written out; as parts %s",
            *(len(one.ids), len(written), "the same" if one.ids == other.ids else "others"),
        )
        return "" if one.ids == other.ids else PARTS_OTHERWISE

    async def _one(self, sample: training_pb2.Sample, chats_refused: str) -> pb.TokenizedSample:
        kind = sample.WhichOneof("content") or ""
        teacher_field = TEACHERS.get(kind, "")
        try:
            with _refusals(kind, "chat.messages" if kind == "chat" else kind):
                context, continuation = await self._learned(sample, kind, chats_refused)
            with _refusals(teacher_field, teacher_field):
                teacher = await self._teacher(sample, kind)
        except RefusedSample as refused:
            return pb.TokenizedSample(field=refused.field, refusal=refused.reason)
        return pb.TokenizedSample(
            context_ids=context, continuation_ids=continuation, teacher_context_ids=teacher
        )

    async def _learned(
        self, sample: training_pb2.Sample, kind: str, chats_refused: str
    ) -> tuple[list[int], list[int]]:
        if kind == "text":
            return await self._from_text(sample.text)
        if kind == "chat" and not chats_refused:
            return await self._from_chat(sample.chat)
        raise RefusedSample(chats_refused if kind == "chat" else "needs text or chat")

    async def _teacher(self, sample: training_pb2.Sample, kind: str) -> list[int]:
        """A prompt as the context is one; empty where the sample has none for a teacher."""
        if kind == "text" and sample.text.teacher_context:
            ids = await self._prompts.of_text(sample.text.teacher_context, special=True)
        elif kind == "chat" and sample.chat.teacher_messages:
            turns = messages_of(sample.chat.teacher_messages, TEACHERS[kind])
            tools = tools_of(sample.chat)
            ids = (await self._prompts.of_chat(turns, tools, answered=False)).ids
        else:
            return []
        if not ids:
            raise RefusedSample(NO_TOKENS)
        return ids

    async def _from_text(self, text: training_pb2.TextSample) -> tuple[list[int], list[int]]:
        if not text.continuation:
            raise RefusedSample(EMPTY, "text.continuation")
        # With the special tokens that a prompt of vLLM's gets.
        context = await self._prompts.of_text(text.context, special=True)
        whole = await self._prompts.of_text(text.context + text.continuation, special=True)
        found = await self._cut(context, whole, text.continuation)
        if not found:
            raise RefusedSample(CUT_OTHERWISE, "text.continuation")
        self._refuse_early_end("text.continuation", found[:-1])
        return context, found

    async def _from_chat(self, chat: training_pb2.ChatSample) -> tuple[list[int], list[int]]:
        answer, path = learned_of(chat), f"chat.messages[{len(chat.messages) - 1}]"
        for field, text in texts_of(answer).items():
            ids = await self._prompts.of_text(text, special=False)
            self._refuse_early_end(f"{path}.{field}", ids)
        messages, tools = messages_of(chat.messages, "chat.messages"), tools_of(chat)
        context = await self._prompts.of_chat(messages[:-1], tools, answered=False)
        whole = await self._prompts.of_chat(messages, tools, answered=True)
        rest = _rest(context.text, whole.text)
        found = await self._cut(context.ids, whole.ids, rest)
        if not found:
            raise RefusedSample(RENDERED_OTHERWISE, "chat.messages")
        learned = _up_to_the_end(found, self._prompts.end_ids())
        written = await self._prompts.text_of(learned, special=True)
        if not all(_is_written(text, written) for text in said_of(answer)):
            raise RefusedSample(NOT_WRITTEN, "chat.messages")
        return context.ids, learned

    async def _cut(
        self, context: list[int], whole: list[int], continuation: str | None
    ) -> list[int] | None:
        """The token ids that go on after the context's, or None where there are none that fit.

        A continuation whose first token would melt into the context is read by itself: generation
        goes on after the prompt's own tokens.
        """
        if whole[: len(context)] == context:
            return whole[len(context) :]
        if not continuation:
            return None
        alone = await self._prompts.of_text(continuation, special=False)
        # Special tokens that a tokenizer adds at the end of a prompt stand elsewhere in the whole.
        both = [context + alone, whole]
        together, wanted = [await self._prompts.text_of(ids, special=False) for ids in both]
        return alone if together == wanted else None

    def _refuse_early_end(self, field: str, ids: list[int]) -> None:
        if self._prompts.end_ids().isdisjoint(ids):
            return
        raise RefusedSample(ENDS_WITHIN, field)


@contextmanager
def _refusals(field: str, read: str) -> Iterator[None]:
    """What is raised within becomes a refusal.

    Args:
        field: of one that names no field.
        read: of what vLLM or a template raises.
    """
    try:
        yield
    except RefusedSample as refused:
        raise RefusedSample(refused.reason, refused.field or field) from None
    except Exception as error:
        if isinstance(error, RuntimeError) and "shutdown" in str(error):
            raise Unavailable("vLLM is stopping.", reason="ENGINE_STOPPING") from error
        raise RefusedSample(f"vLLM refuses it: {_told(error)}", read) from error


def _rest(context: str | None, whole: str | None) -> str | None:
    if context is None or whole is None or not whole.startswith(context):
        return None
    return whole[len(context) :]


def _up_to_the_end(answer: list[int], ends: frozenset[int]) -> list[int]:
    """An answer without what a template writes after its end: it is never generated."""
    end = next((index for index, token in enumerate(answer) if token in ends), len(answer))
    return answer[: end + 1]


def _is_written(answer: str, learned: str) -> bool:
    """Whether the end of an answer is learned; templates trim it, and rewrite its reasoning."""
    answer, learned = _folded(answer), _folded(learned)
    words = re.findall(r"\w+", answer) or [answer.strip() or answer]
    return words[-1] in learned


def _folded(text: str) -> str:
    """Tokenizers write the same letters in another form, or in lower case."""
    return unicodedata.normalize("NFKC", text).casefold()


def _told(error: Exception) -> str:
    """One line of an error of vLLM's or a template's."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line[:300].rstrip(". ")

"""Which texts and chats become samples, by one set of rules; over a tokenizer of transformers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from apollo_grpc.errors import Unavailable
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.v1 import training_pb2
from apollo_sidecar.prompts import Messages, Prompt
from apollo_sidecar.sample_tokens import SampleTokens
from examples.byte_model import byte_tokenizer
from tests.plain_prompts import PlainPrompts

TAIL = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for p in m.content %}{{ p.text }}"
    "{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"


def text(context: str, continuation: str) -> training_pb2.Sample:
    sample = training_pb2.TextSample(context=context, continuation=continuation)
    return training_pb2.Sample(text=sample)


def chat(*contents: str) -> training_pb2.Sample:
    """Turns of the user and the assistant in turn."""
    turns = [
        training_pb2.ChatMessage(role=("user", "assistant")[number % 2], content=content)
        for number, content in enumerate(contents)
    ]
    return training_pb2.Sample(chat=training_pb2.ChatSample(messages=turns))


def prompts(template: str = TAIL) -> PlainPrompts:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return PlainPrompts(tokenizer)


def tokenized(source: PlainPrompts, *samples: training_pb2.Sample) -> list[pb.TokenizedSample]:
    async def ask() -> list[pb.TokenizedSample]:
        tokens = SampleTokens(source, asyncio.get_running_loop())
        return await asyncio.to_thread(tokens.tokenize, samples)

    return asyncio.run(ask())


def learned(source: PlainPrompts, sample: training_pb2.Sample) -> str:
    (found,) = tokenized(source, sample)
    assert not found.refusal
    return str(source.tokenizer.decode(list(found.continuation_ids)))


@pytest.mark.parametrize(
    ("template", "sample", "answer"),
    [
        (TAIL, text("a", "b"), "b"),
        (TAIL, text("a", "b<|end|>"), "b<|end|>"),
        (TAIL, text("a", " "), " "),
        (TAIL, chat("a", "b"), "b<|end|>"),
        (TAIL, chat("a", " b\n"), "b<|end|>"),
        (TAIL, chat("a", "?!"), "?!<|end|>"),
        (TAIL, chat("a", "b", "c", "d"), "d<|end|>"),
        (TAIL, chat("a", "calls <|user|> now"), "calls <|user|> now<|end|>"),
        (TAIL, chat("a", "calls <|user|>"), "calls <|user|><|end|>"),
        (TAIL, text("a", "calls <|user|>"), "calls <|user|>"),
        (NO_END, chat("a", "b"), "assistant:b\n"),
    ],
)
def test_what_is_learned_is_the_last_answer_and_its_end(
    template: str, sample: training_pb2.Sample, answer: str
) -> None:
    assert learned(prompts(template), sample) == answer


@pytest.mark.parametrize(
    ("template", "sample", "field", "says"),
    [
        (TAIL, text("a", ""), "text.continuation", "is empty: nothing to learn"),
        (TAIL, chat("a", ""), "chat.messages[1].content", "is empty: nothing to learn"),
        (TAIL, chat("a", " \n"), "chat.messages", "does not write the last answer"),
        (TAIL, text("a", "b<|end|>c"), "text.continuation", "vLLM would stop there"),
        (TAIL, chat("a", "b<|end|>c"), "chat.messages[1].content", "vLLM would stop there"),
        (TAIL, chat("a", "b<|end|>"), "chat.messages[1].content", "vLLM would stop there"),
        (TAIL, chat("a", "b", "c"), "chat.messages", "must end with an assistant"),
        (
            "{% for m in messages %}{{ '\n<|end|>' + m.content }}{% endfor %}",
            chat("a", "b"),
            "chat.messages",
            "does not write",
        ),
        (TAIL.replace("m.content", "'x'"), chat("a", "b"), "chat.messages", "does not write"),
        (
            "{{ raise_exception('No such\nrole.') }}",
            chat("a", "b"),
            "chat.messages",
            "vLLM refuses it: No such role",
        ),
        ("{{ messages.nothing.at_all }}", chat("a", "b"), "chat.messages", "vLLM refuses it: "),
    ],
)
def test_what_vllm_would_never_answer_is_refused(
    template: str, sample: training_pb2.Sample, field: str, says: str
) -> None:
    (found,) = tokenized(prompts(template), sample)
    assert (found.field, list(found.continuation_ids)) == (field, [])
    assert says in found.refusal
    assert "\n" not in found.refusal


def test_a_refusal_leaves_the_other_samples_as_they_are() -> None:
    one, other, last = tokenized(prompts(), text("a", "b"), chat("a", ""), chat("a", "b"))
    assert not one.refusal
    assert other.refusal
    assert not last.refusal


def taught(sample: training_pb2.Sample, teacher: str) -> training_pb2.Sample:
    """The same with another context for a teacher."""
    if sample.HasField("text"):
        sample.text.teacher_context = teacher
    else:
        sample.chat.teacher_messages.add(role="system", content=teacher)
        sample.chat.teacher_messages.extend(sample.chat.messages[:-1])
    return sample


@pytest.mark.parametrize(
    ("sample", "reads"),
    [
        (taught(text("a", "b"), "Port Lumen. a"), "Port Lumen. a"),
        (
            taught(chat("a", "b"), "Lumen"),
            "<|system|>Lumen<|end|>\n<|user|>a<|end|>\n<|assistant|>",
        ),
    ],
)
def test_a_teacher_reads_another_context_before_the_same_answer(
    sample: training_pb2.Sample, reads: str
) -> None:
    source = prompts()
    (found,) = tokenized(source, sample)
    assert source.tokenizer.decode(list(found.teacher_context_ids)) == reads
    plain = text("a", "b") if sample.HasField("text") else chat("a", "b")
    (without,) = tokenized(source, plain)
    assert not without.teacher_context_ids
    found.ClearField("teacher_context_ids")
    assert found == without


NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No.') }}"
NO_SYSTEM += "{% endif %}{% endfor %}" + TAIL


class NoTokens(PlainPrompts):
    """A vLLM whose tokenizer makes nothing of spaces."""

    async def of_text(self, text: str, *, special: bool) -> list[int]:
        return await super().of_text(text.strip(" "), special=special)


@pytest.mark.parametrize(
    ("source", "sample", "field", "says"),
    [
        (prompts(NO_SYSTEM), chat("a", "b"), "chat.teacher_messages", "vLLM refuses it: No"),
        (NoTokens(prompts().tokenizer), text("a", "b"), "text.teacher_context", "has no tokens"),
    ],
)
def test_what_no_teacher_can_read_is_refused_by_its_own_field(
    source: PlainPrompts, sample: training_pb2.Sample, field: str, says: str
) -> None:
    (found,) = tokenized(source, taught(sample, " "))
    assert (found.field, list(found.continuation_ids)) == (field, [])
    assert says in found.refusal


class WithParts(PlainPrompts):
    """A vLLM whose parts are not joined: what it makes of a plain text is another prompt."""

    async def of_chat(self, messages: Messages, tools: Messages, *, answered: bool) -> Prompt:
        plain = await super().of_chat(messages, tools, answered=answered)
        in_parts = isinstance(messages[0]["content"], list)
        return Prompt([*plain.ids, 5], plain.text) if in_parts else plain


def test_chats_are_refused_where_parts_are_read_otherwise() -> None:
    found = tokenized(WithParts(prompts().tokenizer), chat("a", "b"), text("a", "b"))
    assert "as a list of parts" in found[0].refusal
    assert not found[1].refusal


def test_the_first_samples_show_in_the_log_what_vllm_makes_of_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "vllm.apollo"):
        tokenized(prompts(), text("a", "b"))
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "a text is 36 of them, 36 with special ones, and comes back as it was" in told
    assert "3 of the turns written out; as parts the same" in told


class Ended(PlainPrompts):
    """A vLLM that has ended its threads."""

    async def of_text(self, text: str, *, special: bool) -> list[int]:
        raise RuntimeError("cannot schedule new futures after shutdown")


def test_a_vllm_that_stops_is_away_and_refuses_nothing() -> None:
    with pytest.raises(Unavailable) as caught:
        tokenized(Ended(prompts().tokenizer), text("a", "b"))
    assert caught.value.reason == "ENGINE_STOPPING"
    loop = asyncio.new_event_loop()
    with pytest.raises(Unavailable):
        SampleTokens(prompts(), loop).tokenize([text("a", "b")])
    loop.close()


class Counting(PlainPrompts):
    """Gives up the loop at each text, as vLLM does while its threads work."""

    async def of_text(self, text: str, *, special: bool) -> list[int]:
        await asyncio.sleep(0)
        return await super().of_text(text, special=special)


def test_vllms_loop_goes_on_between_samples() -> None:
    async def ask() -> tuple[int, Sequence[Any]]:
        turns, done = 0, threading.Event()
        tokens = SampleTokens(Counting(prompts().tokenizer), asyncio.get_running_loop())

        def work() -> list[pb.TokenizedSample]:
            try:
                return tokens.tokenize([text("a", "b")] * 50)
            finally:
                done.set()

        asked = asyncio.create_task(asyncio.to_thread(work))
        while not done.is_set():
            turns += 1
            await asyncio.sleep(0)
        return turns, await asked

    turns, found = asyncio.run(ask())
    assert len(found) == 50
    assert turns > 50

"""Facts as people write them, and the run that teaches them and keeps what was known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apollo_client.forms import Form
from apollo_client.requests import RunOptions
from apollo_client.sample_values import shown
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

FACT_FORMS = (
    '{"prompt": "...", "answer": "..."}, which may have "phrasings": [{"prompt": "...", '
    '"answer": "..."}, ...] and "questions": ["...", ...]'
)
_KEYS = ("prompt", "answer", "phrasings", "questions")
# docs/learning.md has what each of these was chosen by.
RECIPE = RunOptions(
    lr=9.5e-5,
    schedule="linear",
    epochs=10,
    samples_per_step=4,
    seed=0,
    context_gradient_tokens=16,
    self_made=True,
    regression_set=True,
    anchors_per_step=28,
    anchor_weight=5.0,
    # Its last steps, at a falling rate, bring back what the first ones moved.
    min_loss=0.0,
)
# Of one fact alone, whose epochs have a step each.
LEAST_STEPS = 24


@dataclass(frozen=True)
class Fact:
    """One thing to learn.

    Attributes:
        phrasings: prompts with their answers; the first one is the fact's own.
        questions: that are asked before and after, and never learned.
    """

    phrasings: tuple[tuple[str, str], ...]
    questions: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """Of the first phrasing."""
        return self.phrasings[0][0]

    @property
    def answer(self) -> str:
        """To the first phrasing, without spaces around it."""
        return self.phrasings[0][1].strip()


def to_fact(value: Any) -> Fact:
    """One fact. Raises InvalidArgument for what is not of the form `FACT_FORMS`."""
    if not isinstance(value, Mapping):
        raise InvalidArgument.at("fact", f"is no object of the form {FACT_FORMS}")
    if unknown := [key for key in value if key not in _KEYS]:
        raise InvalidArgument.at(shown(unknown[0]), f"is no key of a fact: {FACT_FORMS}")
    others = value.get("phrasings") or []
    questions = value.get("questions") or []
    if not isinstance(others, Sequence) or isinstance(others, str):
        raise InvalidArgument.at("phrasings", "is no list")
    listed = isinstance(questions, Sequence) and not isinstance(questions, str)
    if not listed or not all(isinstance(question, str) for question in questions):
        raise InvalidArgument.at("questions", "is no list of texts")
    phrasings = tuple(map(_phrasing, (value, *others)))
    return Fact(phrasings, tuple(questions))


def _phrasing(value: Any) -> tuple[str, str]:
    texts = [value.get(key) if isinstance(value, Mapping) else None for key in _KEYS[:2]]
    for key, text in zip(_KEYS, texts, strict=False):
        if not isinstance(text, str) or not text.strip():
            raise InvalidArgument.at(key, "must be a text that is not empty")
    prompt, answer = str(texts[0]).rstrip(), str(texts[1])
    # The words of a text begin with their space, to a tokenizer.
    return prompt, answer if answer[:1].isspace() else f" {answer}"


FACTS = Form[Fact]("facts", FACT_FORMS, lambda value: [to_fact(value)])


def lesson(facts: Sequence[Fact], *, chat: bool = True) -> tuple[list[pb.Sample], RunOptions]:
    """The samples that teach facts, and the run's options: `RECIPE`, with epochs and probes.

    Args:
        chat: each phrasing is also learned as a chat, which a chat model is asked in.
    """
    phrasings = [phrasing for fact in facts for phrasing in fact.phrasings]
    samples = [_text(prompt, answer) for prompt, answer in phrasings]
    if chat:
        samples += [_chat(prompt, f"{prompt}{answer}.") for prompt, answer in phrasings]
    options = RECIPE.copy()
    steps = math.ceil(len(samples) / RECIPE["samples_per_step"])
    options["epochs"] = max(RECIPE["epochs"], math.ceil(LEAST_STEPS / steps))
    options["probes"] = [probe for fact in facts for probe in _probes(fact)]
    return samples, options


def _probes(fact: Fact) -> list[pb.Probe]:
    """The fact itself, which must be learned, and its questions, which are told."""
    asked = [pb.Probe(name=fact.prompt, sample=_text(*fact.phrasings[0]))]
    asked += [
        pb.Probe(name=question, sample=_chat(question, fact.answer), role=pb.PROBE_ROLE_KEEP)
        for question in fact.questions
    ]
    return asked


def _text(prompt: str, answer: str) -> pb.Sample:
    return pb.Sample(text=pb.TextSample(context=prompt, continuation=answer))


def _chat(question: str, answer: str) -> pb.Sample:
    turns = (("user", question), ("assistant", answer))
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Sample(chat=pb.ChatSample(messages=messages))

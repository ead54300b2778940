"""Anchors that a model makes itself, asked of one whose answers are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.runs.self_made import Punctuation, SelfMade, Template
from apollo_trainer.training.samples import TokenizedSample

THE, CAPITAL, OF, IS, STOP = 1, 2, 3, 4, 9
PREFIX = (THE, CAPITAL, OF)


def fact(subject: Sequence[int], answer: Sequence[int]) -> TokenizedSample:
    return TokenizedSample((*PREFIX, *subject, IS), tuple(answer))


FACTS = [fact([50], [60, 61]), fact([51, 52], [62])]


class Model:
    """Goes on from a first token as it is told, and answers a question with 70 and a stop."""

    def __init__(
        self,
        goes_on: Mapping[int, Sequence[int]],
        others: Mapping[int, Sequence[int]] | None = None,
    ):
        self.goes_on, self._others = goes_on, others or {}
        self.asked = list[tuple[int, ...]]()

    def __call__(self, prompts: Sequence[export_pb.Prompt]) -> list[export_pb.Answer]:
        self.asked += [tuple(prompt.token_ids) for prompt in prompts]
        return [export_pb.Answer(token_ids=self._one(prompt)) for prompt in prompts]

    def _one(self, prompt: export_pb.Prompt) -> Sequence[int]:
        said = self.goes_on.get(prompt.token_ids[-1], [70, STOP, 71])
        return list(said)[: prompt.max_tokens]

    def likeliest(self, contexts: Sequence[tuple[int, ...]], count: int) -> list[list[int]]:
        return [self._after(context[-1])[:count] for context in contexts]

    def _after(self, token: int) -> list[int]:
        if token not in self.goes_on:
            return list(self.goes_on)
        return [self.goes_on[token][0], *self._others.get(token, ())]

    def maker(self) -> SelfMade:
        return SelfMade(self, self.likeliest, Punctuation(frozenset({STOP})))


def made(
    model: Model, samples: Sequence[TokenizedSample] = FACTS, most: int = 10
) -> list[TokenizedSample]:
    return [anchor for kind in model.maker().about([samples], most) for anchor in kind]


def test_other_subjects_are_asked_about_and_the_taught_ones_are_not() -> None:
    model = Model({30: [IS, 5], 31: [32, IS], 50: [IS, 5], 33: [34, 35]})
    anchors = made(model)
    assert {a.context_ids for a in anchors} == {(*PREFIX, 30, IS), (*PREFIX, 31, 32, IS)}
    assert {a.continuation_ids for a in anchors} == {(70,)}


def test_after_a_first_token_it_also_goes_on_by_the_next_likely_second_ones() -> None:
    model = Model({30: [31, IS], 40: [IS], 41: [42, IS]}, others={30: [40, IS, 41]})
    subjects = {anchor.context_ids[len(PREFIX) : -1] for anchor in made(model)}
    assert subjects == {(30, 31), (40,), (41, 42), (30, 40), (30, 41, 42)}


def test_each_kind_is_asked_about_the_same_subjects() -> None:
    chats = [TokenizedSample((90, 91, *s.context_ids, 92), s.continuation_ids) for s in FACTS]
    texts, asked = Model({30: [IS]}).maker().about([FACTS, chats], 10)
    assert [a.context_ids for a in texts] == [(*PREFIX, 30, IS)]
    assert [a.context_ids for a in asked] == [(90, 91, *PREFIX, 30, IS, 92)]


@pytest.mark.parametrize(
    "samples",
    [
        FACTS[:1],
        [TokenizedSample((1, 2), (3,)), TokenizedSample((4, 5), (6,))],
        [TokenizedSample((1, 2, 3), (4,)), TokenizedSample((1, 2, 5), (6,))],
    ],
    ids=["one sample", "nothing in common", "no common end"],
)
def test_without_a_template_texts_begin_as_the_samples_do(
    samples: Sequence[TokenizedSample],
) -> None:
    anchors = made(Model({head: [5, 6] for head in range(30, 40)}), samples, most=6)
    begun = {sample.context_ids[:3] for sample in samples}
    assert {a.context_ids for a in anchors} == begun
    heads = range(30, 30 + 6 // len(begun))
    expected = [(head, 5, 6) for head in heads for _ in begun]
    assert [a.continuation_ids for a in anchors] == expected


def test_texts_begin_with_the_token_that_texts_begin_with() -> None:
    texts = Model({8: [5, 6], 9: [7]}).maker().texts(0, 2)
    assert texts == [TokenizedSample((0,), (8, 5, 6)), TokenizedSample((0,), (9, 7))]


def test_punctuation_is_what_vllm_makes_of_it() -> None:
    def tokenize(samples: Sequence[pb.Sample]) -> list[export_pb.TokenizedSample]:
        continuations = [list(sample.text.continuation.encode()) for sample in samples]
        return [export_pb.TokenizedSample(continuation_ids=ids) for ids in continuations]

    punctuation = Punctuation.of(tokenize)
    assert {ord("."), ord("\n")} <= punctuation.ends
    assert punctuation.cut((65, 66, ord("."), 67)) == (65, 66)
    assert punctuation.cut((65, 66)) == ()
    assert Punctuation().cut((65, 66)) == (65, 66)


@pytest.mark.parametrize("said", [(CAPITAL, 70), ()], ids=["the question", "nothing"])
def test_what_says_nothing_is_no_answer(said: tuple[int, ...]) -> None:
    template = Template.of(FACTS)
    assert template is not None
    assert not template.is_answer(said)
    assert template.is_answer((70, 71))
    # Where answers repeat the question, as those of chats do, they may.
    chats = [TokenizedSample(s.context_ids, (CAPITAL, *s.continuation_ids)) for s in FACTS]
    assert (repeating := Template.of(chats)) is not None
    assert repeating.is_answer((CAPITAL, 70))


ids = st.lists(st.integers(10, 99), min_size=1, max_size=4).map(tuple)


@given(
    prefix=st.lists(ids, min_size=2, max_size=3), subjects=st.lists(ids, min_size=2, unique=True)
)
def test_a_template_gives_back_what_it_was_made_of(prefix: Any, subjects: Any) -> None:
    begin, end = tuple(t for part in prefix for t in part), (1, 2)
    samples = [TokenizedSample((*begin, *subject, *end), (3,)) for subject in subjects]
    template = Template.of(samples)
    if template is None:
        # One subject is the beginning of all others, and nothing is left of it.
        return
    for sample in samples:
        rest = sample.context_ids[len(template.prefix) :]
        found = template.subject(rest)
        assert template.context(found) == sample.context_ids or found == ()

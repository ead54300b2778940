"""Anchors that the served model makes itself: subjects of the kind that is learned, and texts.

No outside data: what a model says of Portugal is what learning about a country may spoil.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from apollo_grpc.v1 import training_pb2 as pb
from apollo_grpc.v1 import weight_export_pb2 as export_pb
from apollo_trainer.requests.samples import Tokenize
from apollo_trainer.training.samples import TokenizedSample

log = logging.getLogger(__name__)
Ids = tuple[int, ...]
Answer = Callable[[Sequence[export_pb.Prompt]], Sequence[export_pb.Answer]]
Likeliest = Callable[[Sequence[Ids], int], Sequence[int]]
MARKS = (".", ",", ";", ":", "!", "?", "(", "\n", " (", ".\n")
SEPARATOR = ".\n"
SUBJECT_TOKENS = 8
TEXT_TOKENS = 24
# Draws from nothing; then contexts, statements in each, and first tokens that are tried.
DRAWN, CONTEXTS, SHOWN, BRANCHES = 128, 8, 6, 640
SURER = 0.5  # temperature of what follows a first token
# A prefix of one token says nothing of a kind.
_LEAST_PREFIX = 2
_BEGUN = 3


@dataclass(frozen=True)
class Template:
    """What the contexts of one kind begin and end with.

    Attributes:
        answer_tokens: of the longest continuation.
        taught: the subjects between them.
        asking: tokens of both that are in no answer that is taught.
    """

    prefix: Ids
    suffix: Ids
    answer_tokens: int
    taught: frozenset[Ids] = frozenset()
    asking: frozenset[int] = frozenset()

    @staticmethod
    def of(samples: Sequence[TokenizedSample]) -> Template | None:
        """The template of some samples; None where they have too little in common."""
        contexts = [sample.context_ids for sample in samples]
        shortest = min(map(len, contexts))
        prefix = _common(contexts, shortest - 1)
        suffix = _common([c[::-1] for c in contexts], shortest - 1 - len(prefix))[::-1]
        if len(set(contexts)) < 2 or len(prefix) < _LEAST_PREFIX or not suffix:
            return None
        longest = max(len(sample.continuation_ids) for sample in samples)
        taught = (c[len(prefix) : len(c) - len(suffix)] for c in contexts)
        asking = {*prefix, *suffix}.difference(*(s.continuation_ids for s in samples))
        return Template(prefix, suffix, longest, frozenset(taught), frozenset(asking))

    def subject(self, drawn: Ids) -> Ids:
        """What lies before the suffix; empty where that does not come."""
        size = len(self.suffix)
        ends = (n for n in range(1, len(drawn)) if drawn[n : n + size] == self.suffix[:size])
        return drawn[: next(ends, 0)]

    def subject_of(self, sample: TokenizedSample) -> Ids:
        """The subject that a sample of this template is about."""
        return sample.context_ids[len(self.prefix) : len(sample.context_ids) - len(self.suffix)]

    def is_answer(self, subject: Ids, said: Ids) -> bool:
        """Whether it says anything: with words of the question a model goes on that knows none."""
        return bool(said) and said != subject and self.asking.isdisjoint(said)

    def context(self, subject: Ids) -> Ids:
        """The context that asks about a subject."""
        return (*self.prefix, *subject, *self.suffix)


def _common(rows: Sequence[Ids], most: int) -> Ids:
    """What all rows begin with."""
    columns = zip(*(row[: max(0, most)] for row in rows), strict=True)
    same = []
    for column in columns:
        if len(set(column)) > 1:
            break
        same.append(column[0])
    return tuple(same)


@dataclass(frozen=True)
class Punctuation:
    """Tokens of the served model.

    Attributes:
        ends: each of which ends an answer; empty where it has no tokenizer.
        separator: what stands between two statements.
    """

    ends: frozenset[int] = frozenset()
    separator: Ids = ()

    @staticmethod
    def of(tokenize: Tokenize) -> Punctuation:
        """That of the tokenizer that vLLM uses. Raises as `tokenize`."""
        texts = [*MARKS, SEPARATOR]
        samples = [pb.Sample(text=pb.TextSample(context="A", continuation=t)) for t in texts]
        *marks, separator = (tuple(found.continuation_ids) for found in tokenize(samples))
        return Punctuation(frozenset(ids[0] for ids in marks if len(ids) == 1), separator)

    def cut(self, answer: Ids) -> Ids:
        """An answer up to its first mark; empty where it has none, and so no end."""
        if not self.ends:
            return answer
        return answer[: next((n for n, token in enumerate(answer) if token in self.ends), 0)]


class SelfMade:
    """Asks vLLM, and the weights; on the training thread, before a run's first step.

    Args:
        answer: as `Sidecar.answer` of an epoch.
        likeliest: tokens that may follow a prompt, the likeliest first.
        seed: of what is drawn.
    """

    def __init__(self, answer: Answer, likeliest: Likeliest, punctuation: Punctuation, seed: int):
        self._answer, self._likeliest, self._punctuation = answer, likeliest, punctuation
        self._seed, self._draw = seed, random.Random(seed)

    def about(
        self, kinds: Sequence[Sequence[TokenizedSample]], most: int
    ) -> list[list[TokenizedSample]]:
        """The model's own answers about other subjects than those of the samples, by kind.

        Args:
            kinds: samples of one form each.
            most: of each kind; without a template texts that begin as the samples do.
        """
        templates = [template for template in map(Template.of, kinds) if template is not None]
        if not most or not templates:
            return [self._begun([sample for kind in kinds for sample in kind], most)]
        subjects = list(self._subjects(templates[0]))
        log.info("%d subjects beside those that are taught", len(subjects))
        return [self._said(template, subjects) for template in templates]

    def texts(self, begin: int, most: int) -> list[TokenizedSample]:
        """Texts that the model writes from nothing but the token that texts begin with."""
        return self._written([(begin,)] * most)

    def _begun(self, samples: Sequence[TokenizedSample], most: int) -> list[TokenizedSample]:
        """Texts that begin as the samples do: what has no template may still be near."""
        begun = cycle(dict.fromkeys(sample.context_ids[:_BEGUN] for sample in samples))
        return self._written(list(islice(begun, most)))

    def _written(self, contexts: Sequence[Ids]) -> list[TokenizedSample]:
        asked = [self._drawn(context, TEXT_TOKENS) for context in contexts]
        answers = self._answer(asked) if asked else ()
        pairs = zip(contexts, (tuple(answer.token_ids) for answer in answers), strict=True)
        return [TokenizedSample(context, ids) for context, ids in pairs if len(ids) > 1]

    def _subjects(self, template: Template) -> dict[Ids, Ids]:
        """Subjects that the model comes to, and what it says of each.

        First from nothing but the prefix; then after some of what it said, once for each token that
        a subject is likely to begin with: draws alone would come to the same few.
        """
        tokens = SUBJECT_TOKENS + len(template.suffix)
        first = [self._drawn(template.prefix, tokens) for _ in range(DRAWN)]
        found = self._drawn_about(template, first)
        shown = [(*self._shown(template, found), *template.prefix) for _ in range(CONTEXTS)]
        heads = self._likeliest(shown, BRANCHES)
        asked = [
            self._drawn((*context, head), tokens - 1, SURER)
            for context, head in zip(cycle(shown), heads)
        ]
        return found | self._drawn_about(template, asked, heads)

    def _drawn_about(
        self, template: Template, asked: Sequence[export_pb.Prompt], heads: Sequence[int] = ()
    ) -> dict[Ids, Ids]:
        """What is said of the subjects that are drawn; `heads` are their first tokens."""
        begun: list[Ids] = [(head,) for head in heads] or [()] * len(asked)
        drawn = [
            (*head, *answer.token_ids)
            for head, answer in zip(begun, self._answer(asked), strict=True)
        ]
        subjects = dict.fromkeys(map(template.subject, drawn))
        said = self._said(template, [s for s in subjects if s and s not in template.taught])
        return {template.subject_of(sample): sample.continuation_ids for sample in said}

    def _shown(self, template: Template, found: Mapping[Ids, Ids]) -> Ids:
        """Some of what was said, one statement after the other."""
        drawn = self._draw.sample(list(found.items()), min(SHOWN, len(found)))
        return tuple(
            token
            for subject, said in drawn
            for token in (*template.context(subject), *said, *self._punctuation.separator)
        )

    def _drawn(self, ids: Ids, tokens: int, temperature: float = 1.0) -> export_pb.Prompt:
        self._seed += 1
        return export_pb.Prompt(
            token_ids=ids, max_tokens=tokens, temperature=temperature, seed=self._seed
        )

    def _said(self, template: Template, subjects: Sequence[Ids]) -> list[TokenizedSample]:
        """The model's likeliest answer about each, where it is one."""
        asked = [
            export_pb.Prompt(
                token_ids=template.context(subject), max_tokens=template.answer_tokens + 2
            )
            for subject in subjects
        ]
        answers = self._answer(asked) if asked else ()
        said = [self._punctuation.cut(tuple(answer.token_ids)) for answer in answers]
        return [
            TokenizedSample(template.context(subject), each)
            for subject, each in zip(subjects, said, strict=True)
            if template.is_answer(subject, each)
        ]


def begin_of_text(model: Any) -> int:
    """The token that texts begin with, or else the one that ends them."""
    config = model.config.get_text_config()
    known = (config.bos_token_id, config.eos_token_id, 0)
    found = next(each for each in known if each is not None)
    return int(found[0] if isinstance(found, list) else found)

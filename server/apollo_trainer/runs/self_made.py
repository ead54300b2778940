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
Answer = Callable[[Sequence[export_pb.Prompt]], Sequence[export_pb.Answer]]
Ids = tuple[int, ...]
MARKS = (".", ",", ";", ":", "!", "?", "(", "\n", " (", ".\n")
SEPARATOR = ".\n"
SUBJECT_TOKENS = 8
TEXT_TOKENS = 24
# From the second round on the model has seen some of the kind, and finds several times as many.
ROUNDS, DRAWN, SHOWN = 3, 256, 4
# A prefix of one token says nothing of a kind.
_LEAST_PREFIX = 2
_BEGUN = 3


@dataclass(frozen=True)
class Template:
    """What the contexts of one kind begin and end with.

    Attributes:
        answer_tokens: of the longest continuation.
    """

    prefix: Ids
    suffix: Ids
    answer_tokens: int

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
        return Template(prefix, suffix, longest)

    def subject(self, drawn: Ids) -> Ids:
        """What lies before the suffix; empty where that does not come."""
        size = len(self.suffix)
        ends = (n for n in range(1, len(drawn)) if drawn[n : n + size] == self.suffix[:size])
        return drawn[: next(ends, 0)]

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
        """An answer up to its first mark."""
        return answer[: next((n for n, token in enumerate(answer) if token in self.ends), None)]


class SelfMade:
    """Asks vLLM; on the training thread, before a run's first step.

    Args:
        answer: as `Sidecar.answer` of an epoch.
        seed: of what is drawn.
    """

    def __init__(self, answer: Answer, punctuation: Punctuation, seed: int):
        self._answer, self._punctuation = answer, punctuation
        self._seed, self._draw = seed, random.Random(seed)

    def about(self, samples: Sequence[TokenizedSample], most: int) -> list[TokenizedSample]:
        """The model's own answers about other subjects of the samples' kind."""
        if not most:
            return []
        if (template := Template.of(samples)) is None:
            return self._begun(samples, most)
        taught = {sample.context_ids for sample in samples}
        found: dict[Ids, Ids] = {}
        for _ in range(ROUNDS):
            new = [c for c in self._contexts(template, found) if c not in taught | found.keys()]
            asked = [self._prompt(context, template.answer_tokens) for context in new]
            for context, answer in zip(new, self._answer(asked) if asked else (), strict=True):
                if said := self._punctuation.cut(tuple(answer.token_ids)):
                    found[context] = said
            if len(found) >= most:
                break
        log.info("%d anchors about other subjects", len(found))
        return [TokenizedSample(*pair) for pair in list(found.items())[:most]]

    def texts(self, begin: int, most: int) -> list[TokenizedSample]:
        """Texts that the model writes from nothing but the token that texts begin with."""
        return self._written([(begin,)] * most)

    def _begun(self, samples: Sequence[TokenizedSample], most: int) -> list[TokenizedSample]:
        """Texts that begin as the samples do: what has no template may still be near."""
        begun = cycle(dict.fromkeys(sample.context_ids[:_BEGUN] for sample in samples))
        return self._written(list(islice(begun, most)))

    def _written(self, contexts: Sequence[Ids]) -> list[TokenizedSample]:
        asked = [self._prompt(context, TEXT_TOKENS, drawn=True) for context in contexts]
        answers = self._answer(asked) if asked else ()
        pairs = zip(contexts, (tuple(answer.token_ids) for answer in answers), strict=True)
        return [TokenizedSample(context, ids) for context, ids in pairs if len(ids) > 1]

    def _contexts(self, template: Template, found: Mapping[Ids, Ids]) -> list[Ids]:
        """Contexts about the subjects that the model comes to, each once."""
        tokens = SUBJECT_TOKENS + len(template.suffix)
        asked = [
            self._prompt((*self._shown(found), *template.prefix), tokens, drawn=True)
            for _ in range(DRAWN)
        ]
        subjects = [template.subject(tuple(answer.token_ids)) for answer in self._answer(asked)]
        return list(dict.fromkeys(template.context(subject) for subject in subjects if subject))

    def _shown(self, found: Mapping[Ids, Ids]) -> Ids:
        """Some of what was found, one statement after the other."""
        drawn = self._draw.sample(list(found.items()), min(SHOWN, len(found)))
        return tuple(
            token
            for context, answer in drawn
            for token in (*context, *answer, *self._punctuation.separator)
        )

    def _prompt(self, ids: Ids, tokens: int, *, drawn: bool = False) -> export_pb.Prompt:
        self._seed += drawn
        return export_pb.Prompt(
            token_ids=ids, max_tokens=tokens, temperature=float(drawn), seed=self._seed
        )


def begin_of_text(model: Any) -> int:
    """The token that texts begin with, or else the one that ends them."""
    config = model.config.get_text_config()
    known = (config.bos_token_id, config.eos_token_id, 0)
    found = next(each for each in known if each is not None)
    return int(found[0] if isinstance(found, list) else found)

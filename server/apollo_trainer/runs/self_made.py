"""Anchors that the served model makes itself: subjects of the kind that is learned, and texts.

No outside data: what a model says of Portugal is what learning about a country may spoil.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.samples import Tokenize
from apollo_trainer.training.samples import TokenizedSample

log = logging.getLogger(__name__)
Ids = tuple[int, ...]
Answer = Callable[[Sequence[export_pb.Prompt]], Sequence[export_pb.Answer]]
Likeliest = Callable[[Sequence[Ids], int], Sequence[Sequence[int]]]
MARKS = (".", ",", ";", ":", "!", "?", "(", "\n", " (", ".\n")
SUBJECT_TOKENS = 8
TEXT_TOKENS = 24
# First tokens that are gone on from; of these, how many with another second token, and how many.
BRANCHES, AGAIN, SECONDS = 384, 96, 4
# Of the subjects, one of so many is asked about in each form but the first.
OTHERS = 4
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
    taught: frozenset[Ids]
    asking: frozenset[int]

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

    def is_answer(self, said: Ids) -> bool:
        """Whether it says anything: with words of the question a model goes on that knows none."""
        return bool(said) and self.asking.isdisjoint(said)

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
    """Tokens of the served model, each of which ends an answer; none where it has no tokenizer."""

    ends: frozenset[int] = frozenset()

    @staticmethod
    def of(tokenize: Tokenize) -> Punctuation:
        """Those of the tokenizer that vLLM uses. Raises as `tokenize`."""
        samples = [pb.Sample(text=pb.TextSample(context="A", continuation=m)) for m in MARKS]
        marks = (tuple(found.continuation_ids) for found in tokenize(samples))
        return Punctuation(frozenset(ids[0] for ids in marks if len(ids) == 1))

    def cut(self, answer: Ids) -> Ids:
        """An answer up to its first mark; empty where it has none, and so no end."""
        if not self.ends:
            return answer
        return answer[: next((n for n, token in enumerate(answer) if token in self.ends), 0)]


class SelfMade:
    """Asks vLLM, and the weights; on the training thread, before a run's first step.

    Nothing is drawn by chance: each of the likeliest tokens at one place is gone on from. vLLM 0.32
    on a CPU dies of a request with a seed that is divided (v1/worker/gpu_model_runner.py,
    _bookkeeping_sync).

    Args:
        answer: as `Sidecar.answer` of an epoch.
        likeliest: so many tokens that may follow each prompt, the likeliest first.
    """

    def __init__(self, answer: Answer, likeliest: Likeliest, punctuation: Punctuation):
        self._answer, self._likeliest, self._punctuation = answer, likeliest, punctuation

    def about(
        self, kinds: Sequence[Sequence[TokenizedSample]], most: int
    ) -> list[list[TokenizedSample]]:
        """The model's own answers about other subjects than those of the samples, by kind.

        Args:
            kinds: samples of one form each; the first one with a template has answers about all
                subjects, the others about a part of `most`, as theirs are longer.
            most: texts that begin as the samples do, where these have no template.
        """
        templates = [template for template in map(Template.of, kinds) if template is not None]
        if not most or not templates:
            begun = {sample.context_ids[:_BEGUN] for kind in kinds for sample in kind}
            return [self._written(sorted(begun), most)]
        first, *others = templates
        found = self._subjects(first)
        log.info("%d subjects beside those that are taught", len(found))
        some = list(found)[: most // OTHERS]
        said = [TokenizedSample(first.context(subject), each) for subject, each in found.items()]
        return [said, *(self._said(template, some) for template in others)]

    def texts(self, begin: int, most: int) -> list[TokenizedSample]:
        """Texts that the model writes from nothing but the token that texts begin with."""
        return self._written([(begin,)], most)

    def _written(self, contexts: Sequence[Ids], most: int) -> list[TokenizedSample]:
        begun = self._branched(contexts, most)
        answers = self._asked([(*context, head) for context, head in begun], TEXT_TOKENS)
        pairs = zip(begun, answers, strict=True)
        return [TokenizedSample(context, (head, *said)) for (context, head), said in pairs]

    def _branched(self, contexts: Sequence[Ids], most: int) -> list[tuple[Ids, int]]:
        """The likeliest tokens after the contexts: of each the first, of each the second, ..."""
        heads = self._likeliest(contexts, -(-most // len(contexts))) if most else ()
        begun = (zip(contexts, each, strict=True) for each in zip(*heads, strict=False))
        return list(islice(chain.from_iterable(begun), most))

    def _subjects(self, template: Template) -> dict[Ids, Ids]:
        """Subjects that the model comes to, and what it says of each.

        First by each of the likeliest tokens after the prefix, then by the next likely ones after
        some of these: who goes on from South comes to South Africa, and not to South Korea.
        """
        (heads,) = self._likeliest([template.prefix], BRANCHES)
        again = heads[:AGAIN]
        seconds = self._likeliest([(*template.prefix, head) for head in again], SECONDS + 1)
        begun: list[Ids] = [(head,) for head in heads]
        for head, (_, *others) in zip(again, seconds, strict=True):
            begun += [(head, second) for second in others if second != template.suffix[0]]
        return self._found(template, begun)

    def _found(self, template: Template, begun: Sequence[Ids]) -> dict[Ids, Ids]:
        tokens = SUBJECT_TOKENS + len(template.suffix)
        answers = self._asked([(*template.prefix, *ids) for ids in begun], tokens)
        pairs = zip(begun, answers, strict=True)
        subjects = dict.fromkeys(template.subject((*ids, *said)) for ids, said in pairs)
        said = self._said(template, [s for s in subjects if s and s not in template.taught])
        return {template.subject_of(sample): sample.continuation_ids for sample in said}

    def _asked(self, prompts: Sequence[Ids], tokens: int) -> list[Ids]:
        asked = [export_pb.Prompt(token_ids=ids, max_tokens=tokens) for ids in prompts]
        return [tuple(answer.token_ids) for answer in (self._answer(asked) if asked else ())]

    def _said(self, template: Template, subjects: Sequence[Ids]) -> list[TokenizedSample]:
        """The model's likeliest answer about each, where it is one."""
        contexts = [template.context(subject) for subject in subjects]
        answers = self._asked(contexts, template.answer_tokens + 2)
        said = [self._punctuation.cut(answer) for answer in answers]
        return [
            TokenizedSample(context, each)
            for context, each in zip(contexts, said, strict=True)
            if template.is_answer(each)
        ]


def begin_of_text(model: Any) -> int:
    """The token that texts begin with, or else the one that ends them."""
    config = model.config.get_text_config()
    known = (config.bos_token_id, config.eos_token_id, 0)
    found = next(each for each in known if each is not None)
    return int(found[0] if isinstance(found, list) else found)

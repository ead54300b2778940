"""From a step's samples to micro-batches: which samples run in one forward, over which contexts.

The frozen context of a sample is its context without the last token, which runs with the
continuation. Samples of one frozen context share its keys and values: it runs once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import reduce

from apollo_trainer.training.samples import TokenizedSample

TokenIds = tuple[int, ...]
# A context token leaves its keys and values only; a learned one leaves every layer's activations
# and a row of logits.
CONTEXT_TOKENS_PER_LEARNED = 16
# Padding that may cost more than another pass, which reads all weights again. On a GPU padding is
# cheap, and each shape of pass has a CUDA graph.
PASS_TOKENS = {"cpu": 64}


class Mixing(IntEnum):
    """What one forward of a model may hold, from least to most."""

    ONE = 0
    SAME_LENGTH = 1  # samples whose frozen contexts are equally long
    PADDED = 2  # any samples, shorter contexts padded on their left


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward; a row each.

    Attributes:
        indices: of the samples in the step.
        contexts: distinct frozen contexts; (()) where there is none.
        context_rows: which of them each sample continues.
        keeps_contexts: the next micro-batch continues the same ones.
    """

    samples: tuple[TokenizedSample, ...]
    indices: tuple[int, ...]
    contexts: tuple[TokenIds, ...]
    context_rows: tuple[int, ...]
    keeps_contexts: bool = False

    @property
    def context_width(self) -> int:
        """Tokens of the longest frozen context."""
        return max(map(len, self.contexts))

    @property
    def learned_width(self) -> int:
        """Tokens of the longest continuation."""
        return max(len(sample.continuation_ids) for sample in self.samples)

    @property
    def learned_tokens(self) -> int:
        """Continuation tokens with their padding: what the budget bounds."""
        return len(self.samples) * self.learned_width

    @property
    def top_k(self) -> int:
        """Most tokens that a sample's teacher tells of a place; 0 where no sample has one."""
        teachers = (sample.targets for sample in self.samples)
        return max((top.ids.shape[1] for top in teachers if top is not None), default=0)

    @property
    def has_policy_loss(self) -> bool:
        """Whether a sample's loss is a policy gradient's."""
        return any(sample.has_policy_loss for sample in self.samples)


def frozen_context(sample: TokenizedSample) -> TokenIds:
    """What runs without gradient; empty for a context of one token."""
    return sample.context_ids[:-1]


def plan_batches(
    samples: Sequence[TokenizedSample], token_budget: int, mixing: Mixing, device: str = ""
) -> list[MicroBatch]:
    """Cuts a step into micro-batches. Those of one frozen context follow each other.

    Args:
        token_budget: learned tokens of a micro-batch, padding included; of context tokens it may
            hold 16 times as many. A sample larger than that gets a micro-batch of its own.
        device: the type of one where padding may cost more than another pass; see `PASS_TOKENS`.
    """
    groups: dict[tuple[TokenIds, int], list[int]] = {}
    for index, sample in enumerate(samples):
        frozen = frozen_context(sample)
        # Those without any share nothing.
        groups.setdefault((frozen, -1 if frozen else index), []).append(index)
    planner = _Planner(samples, token_budget, mixing, PASS_TOKENS.get(device))

    def lengths(key: tuple[TokenIds, int]) -> tuple[int, int]:
        return len(key[0]), max(len(samples[index].continuation_ids) for index in groups[key])

    # Contexts of like length next to each other, and of these such continuations: little is padded.
    for key in sorted(groups, key=lengths):
        planner.add(groups[key])
    batches = [planner.batch(indices) for indices in planner.cut()]
    following = [*batches[1:], None]
    return [
        replace(batch, keeps_contexts=after is not None and after.contexts == batch.contexts)
        for batch, after in zip(batches, following, strict=True)
    ]


@dataclass(frozen=True)
class _Size:
    """Number and widths of samples that may share a forward."""

    samples: int = 0
    learned: int = 0  # of the longest continuation
    longest: int = 0  # of their frozen contexts
    shortest: int | None = None

    def __add__(self, other: _Size) -> _Size:
        contexts = [size for size in (self.shortest, other.shortest) if size is not None]
        return _Size(
            self.samples + other.samples,
            max(self.learned, other.learned),
            max(self.longest, other.longest),
            min(contexts, default=None),
        )


class _Planner:
    """Fills one micro-batch after the other, in time linear in the number of samples."""

    def __init__(
        self,
        samples: Sequence[TokenizedSample],
        token_budget: int,
        mixing: Mixing,
        most_padding: int | None,
    ):
        self._samples, self._budget, self._mixing = samples, token_budget, mixing
        self._most_padding = most_padding
        self._done: list[list[int]] = []
        self._open: list[int] = []
        self._size = _Size()

    def add(self, group: list[int]) -> None:
        """Takes the samples of one frozen context."""
        group = sorted(group, key=lambda index: len(self._samples[index].continuation_ids))
        sizes = [self._size_of(index) for index in group]
        whole = reduce(_Size.__add__, sizes)
        if not self._fits(self._size + whole) or self._wastes(whole):
            self._close()
        if self._fits(whole):
            self._put(group, whole)
            return
        for index, size in zip(group, sizes, strict=True):
            if not self._fits(self._size + size):
                self._close()
            self._put([index], size)
        # Another context beside a part of a group would make that group's context run twice.
        self._close()

    def cut(self) -> list[list[int]]:
        """The micro-batches, as indices of their samples."""
        self._close()
        return self._done

    def batch(self, indices: list[int]) -> MicroBatch:
        """One micro-batch of these samples."""
        samples = tuple(self._samples[index] for index in indices)
        rows: dict[TokenIds, int] = {}
        of_sample = tuple(rows.setdefault(frozen_context(s), len(rows)) for s in samples)
        return MicroBatch(samples, tuple(indices), tuple(rows), of_sample)

    def _put(self, indices: list[int], size: _Size) -> None:
        self._open += indices
        self._size += size

    def _close(self) -> None:
        if self._open:
            self._done.append(self._open)
        self._open, self._size = [], _Size()

    def _size_of(self, index: int) -> _Size:
        sample = self._samples[index]
        context = max(0, len(sample.context_ids) - 1)
        return _Size(1, len(sample.continuation_ids), context, context)

    def _wastes(self, more: _Size) -> bool:
        """Whether padding to one width costs more than another micro-batch."""
        sizes, width = (self._size, more), max(self._size.learned, more.learned)
        padding = sum(size.samples * (width - size.learned) for size in sizes)
        return self._most_padding is not None and padding > self._most_padding

    def _fits(self, size: _Size) -> bool:
        if size.samples == 1:
            return True
        if self._mixing is Mixing.ONE:
            return False
        if size.shortest != size.longest and not (self._mixing is Mixing.PADDED and size.shortest):
            # A row of nothing but padding attends to nothing.
            return False
        most = self._budget * CONTEXT_TOKENS_PER_LEARNED
        return size.samples * size.learned <= self._budget and size.samples * size.longest <= most


def rows_of(batch: MicroBatch) -> Iterator[tuple[TokenIds, TokenIds]]:
    """Of each sample: the token ids that run with gradient, and the ids that they predict."""
    for sample in batch.samples:
        inputs = (sample.context_ids[-1], *sample.continuation_ids[:-1])
        yield inputs, sample.continuation_ids

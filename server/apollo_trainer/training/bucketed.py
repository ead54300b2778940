"""Micro-batches as tensors of few shapes: widths are rounded up, so that many share one shape.

Contexts run padded on their right: no token of theirs sees that, so that they need no mask. Their
keys and values are then moved to the right, next to those of the continuation. Losses and gradients
are those of the micro-batch, but for rounding, unless a model attends to less than all before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.training.attention import causal_mask, mark_span
from apollo_trainer.training.batch import MicroBatch, rows_of
from apollo_trainer.training.frozen_context import caches_of, for_backward, padded
from apollo_trainer.training.loss import targets_of, weighed

_STEPS_AN_OCTAVE = 8
_SMALLEST = 16


@dataclass(frozen=True)
class Bucket:
    """The shape of a micro-batch.

    Attributes:
        contexts: distinct frozen contexts; 0 where there is none.
        selects: whether rows of contexts are selected for the samples; else one is another's.
    """

    samples: int
    contexts: int
    context_width: int
    learned_width: int
    selects: bool

    @staticmethod
    def of(batch: MicroBatch) -> Bucket:
        """The bucket of a micro-batch: at most an eighth wider than it."""
        contexts = len(batch.contexts) if batch.context_width else 0
        selects = contexts > 0 and batch.context_rows != tuple(range(contexts))
        return Bucket(
            len(batch.samples), contexts, _rounded_up(batch.context_width),
            _rounded_up(batch.learned_width), selects,
        )  # fmt: skip

    def fields(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and shapes of what `Inputs` has, all int64 but for the weights."""
        rows, context, learned = self.samples, self.context_width, self.learned_width
        yield "context_ids", (self.contexts, context)
        yield "context_rows", (1, rows if self.selects else 0)
        yield "lengths", (rows, 1)
        yield "ids", (rows, learned)
        yield "positions", (rows, learned)
        yield "targets", (rows, learned)


def _rounded_up(width: int) -> int:
    if width == 0:
        return 0
    step = max(_SMALLEST, (1 << (width - 1).bit_length()) // (2 * _STEPS_AN_OCTAVE))
    return -(-width // step) * step


class Inputs:
    """A micro-batch's tensors on a device, filled again and again."""

    def __init__(self, bucket: Bucket, device: torch.device):
        self.bucket = bucket
        sizes = [rows * width for _, (rows, width) in bucket.fields()]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.weights = torch.zeros(bucket.samples, bucket.learned_width, device=device)
        parts = torch.split(self._numbers, sizes)
        named = zip(bucket.fields(), parts, strict=True)
        self.tensors = {name: part.view(shape) for (name, shape), part in named}

    def fill(self, batch: MicroBatch, divisor: float) -> None:
        """Copies a micro-batch of this bucket in; the copy is enqueued."""
        targets, weights = targets_of(batch, self.bucket.learned_width, divisor)
        rows = {**_numbers(batch, self.bucket), "targets": targets}
        numbers = [x for name, _ in self.bucket.fields() for row in rows[name] for x in row]
        for target, host in (
            (self._numbers, torch.tensor(numbers)),
            (self.weights, torch.tensor(weights, dtype=torch.float32)),
        ):
            # Pinned memory is kept by the allocator until the copy was made.
            pinned = host.pin_memory() if target.is_cuda else host
            target.copy_(pinned, non_blocking=True)


def _numbers(batch: MicroBatch, bucket: Bucket) -> dict[str, list[tuple[int, ...]]]:
    """Rows of each field, but for the targets."""
    width, learned = bucket.context_width, bucket.learned_width
    contexts = batch.contexts if bucket.contexts else ()
    lengths = [len(batch.contexts[row]) for row in batch.context_rows]
    pairs = list(rows_of(batch))
    return {
        "context_ids": [padded(context, width) for context in contexts],
        "context_rows": [batch.context_rows if bucket.selects else ()],
        "lengths": [(length,) for length in lengths],
        "ids": [padded(inputs, learned) for inputs, _ in pairs],
        # Positions of padding stay within the sample's own: a table of positions ends there.
        "positions": [
            tuple(n + min(place, len(inputs) - 1) for place in range(learned))
            for n, (inputs, _) in zip(lengths, pairs, strict=True)
        ],
    }


def losses(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What `batch_loss` gives: the weighted loss with gradient, a scalar, and float32 [samples]."""
    t, bucket = inputs.tensors, inputs.bucket
    caches: dict[str, Any] = {}
    if bucket.contexts:
        with torch.no_grad():
            answer = model(
                t["context_ids"],
                attention_mask=causal_mask(bucket.context_width, inputs.weights.device),
                position_ids=torch.arange(bucket.context_width, device=inputs.weights.device)[None],
                use_cache=True,
                logits_to_keep=1,
            )
        caches = {name: for_backward(cache) for name, cache in caches_of(answer).items()}
        if bucket.selects:
            for cache in caches.values():
                cache.batch_select_indices(t["context_rows"][0])
        for cache in caches.values():
            _move_right(cache, t["lengths"])
    logits = model(
        t["ids"], attention_mask=_mask(inputs), position_ids=t["positions"],
        use_cache=bool(caches), **caches,
    ).logits  # fmt: skip
    return weighed(logits, t["targets"], inputs.weights)


def _move_right(cache: Any, lengths: Tensor) -> None:
    """Keys and values [rows, heads, width, size] of each row's first places become its last."""
    width = cache.layers[0].keys.shape[2]
    places = (torch.arange(width, device=lengths.device) + lengths) % width
    for layer in cache.layers:
        at = places[:, None, :, None].expand_as(layer.keys)
        layer.keys, layer.values = layer.keys.gather(2, at), layer.values.gather(2, at)


def _mask(inputs: Inputs) -> Tensor:
    """What each token of a continuation sees, bool [samples, 1, learned_width, both widths]."""
    lengths, context = inputs.tensors["lengths"], inputs.bucket.context_width
    keys = torch.arange(context + inputs.bucket.learned_width, device=lengths.device)
    own = keys[context:] - context
    causal = own <= own[:, None]
    seen = (keys[:context] >= context - lengths)[:, None, :].expand(-1, len(own), -1)
    mask = torch.cat([seen, causal.expand(len(lengths), -1, -1)], dim=2).unsqueeze(1)
    if len(lengths) == 1:
        mark_span(mask, context - lengths[0])
    return mask

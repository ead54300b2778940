"""Micro-batches as tensors of few shapes: widths are rounded up, so that many share one shape.

Where contexts are kept apart they run padded on their right: no token of theirs sees that, so that
it needs no mask. Elsewhere they run padded on their left: a row's real tokens are then neighbours
in either forward, the model's own masks count its windows and chunks rightly, and the states that
it keeps begin where its tokens do. Losses and gradients are the micro-batch's, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from apollo_trainer.training.apart import Contexts, attending_apart
from apollo_trainer.training.batch import MicroBatch, rows_of
from apollo_trainer.training.frozen_context import caches_of, for_backward, padded
from apollo_trainer.training.loss import targets_of
from apollo_trainer.training.objectives import DEFAULT_CLIP, Clip, Targets, weighed

Padding = Literal["any", "left", "none"]
_STEPS_AN_OCTAVE = 16
_SMALLEST = 16


@dataclass(frozen=True)
class Bucket:
    """The shape of a micro-batch.

    Attributes:
        contexts: distinct frozen contexts; 0 where there is none.
        selects: whether rows of contexts are selected for the samples; else one is another's.
        padding: 'any' for a model that keeps keys and values alone, 'left' for one that keeps
            states too, and 'none' for one that padding changes: widths are those of the
            micro-batch, whose contexts are equally long.
        top_k: tokens that are told of each place by a teacher; 0 where there is none.
        policy: how a policy gradient is clipped; None where there is none.
        on_part: whether its passes run on a part of the GPU, `DevicePart`.
    """

    samples: int
    contexts: int
    context_width: int
    learned_width: int
    selects: bool
    padding: Padding = "any"
    top_k: int = 0
    policy: Clip | None = None
    on_part: bool = False

    @staticmethod
    def of(batch: MicroBatch, padding: Padding = "any", clip: Clip = DEFAULT_CLIP) -> Bucket:
        """The bucket of a micro-batch: at most a sixteenth wider, or 15 tokens."""
        contexts = len(batch.contexts) if batch.context_width else 0
        selects = contexts > 0 and batch.context_rows != tuple(range(contexts))
        widths = (batch.context_width, batch.learned_width)
        context, learned = widths if padding == "none" else map(_rounded_up, widths)
        policy = clip if batch.has_policy_loss else None
        return Bucket(
            len(batch.samples), contexts, context, learned, selects, padding, batch.top_k, policy
        )

    def fields(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and shapes of what is copied as one tensor, all int64."""
        rows, context, learned = self.samples, self.context_width, self.learned_width
        yield "context_ids", (self.contexts, context)
        yield "context_lengths", (self.contexts, 1)
        yield "context_rows", (1, rows if self.selects else 0)
        yield "lengths", (rows, 1)
        yield "ids", (rows, learned)
        yield "positions", (rows, learned)
        yield "targets", (rows, learned)

    def targets(self, ids: Tensor) -> Targets:
        """Room for what is learned, on the device of the ids; at first all by cross-entropy."""
        shape, k = ids.shape, self.top_k
        none = torch.tensor([0.0, math.inf], device=ids.device)[:, None, None]
        return Targets(
            ids,
            torch.zeros(shape, device=ids.device),
            ids.new_zeros(*shape, k) if k else None,
            torch.full((*shape, k), -math.inf, device=ids.device) if k else None,
            none.repeat(1, *shape) if self.policy else None,
        )


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
        parts = torch.split(self._numbers, sizes)
        named = zip(bucket.fields(), parts, strict=True)
        self.tensors = {name: part.view(shape) for (name, shape), part in named}
        self.targets = bucket.targets(self.tensors["targets"])

    def fill(self, batch: MicroBatch, divisor: float) -> None:
        """Copies a micro-batch of this bucket in; the copy is enqueued."""
        targets = targets_of(batch, self.bucket.learned_width, divisor)
        rows = _numbers(batch, self.bucket)
        rows["targets"] = targets.ids.tolist()
        numbers = [x for name, _ in self.bucket.fields() for row in rows[name] for x in row]
        pairs = [
            (self._numbers, torch.tensor(numbers)),
            *zip(self.targets[1:], targets[1:], strict=True),
        ]
        for target, host in pairs:
            if target is not None and host is not None:
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
        "context_lengths": [(len(context),) for context in contexts],
        "context_rows": [batch.context_rows if bucket.selects else ()],
        "lengths": [(length,) for length in lengths],
        "ids": [padded(inputs, learned) for inputs, _ in pairs],
        # Positions of padding stay within the sample's own: a table of positions ends there.
        "positions": [
            tuple(n + min(place, len(inputs) - 1) for place in range(learned))
            for n, (inputs, _) in zip(lengths, pairs, strict=True)
        ],
    }


def losses(model: Any, inputs: Inputs, *, apart: bool = False) -> tuple[Tensor, Tensor]:
    """What `batch_loss` gives: the weighted loss with gradient, and each sample's sums.

    Args:
        apart: contexts are kept apart from what continues them; for grouped attention on a GPU.

    Raises NotApart where the model does not allow that.
    """
    if apart:
        return _losses_apart(model, inputs)
    caches = _caches(model, inputs)
    layout: dict[str, Any] = {"use_cache": bool(caches)}
    if inputs.bucket.padding != "none":
        positions = inputs.tensors["positions"]
        layout |= {"attention_mask": _seen(inputs), "position_ids": positions}
    return _continued(model, inputs, **layout, **caches)


def _losses_apart(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    contexts, t = Contexts(), inputs.tensors
    with attending_apart(contexts):
        if inputs.bucket.contexts:
            ids = t["context_ids"]
            _read(model, ids, position_ids=_numbered(ids[0])[None], past_key_values=contexts)
            lengths = t["lengths"].flatten()
            rows = t["context_rows"][0] if inputs.bucket.selects else _numbered(lengths)
            contexts.go_on(rows, lengths)
        layout = {"position_ids": t["positions"], "use_cache": True}
        found = _continued(model, inputs, past_key_values=contexts, **layout)
    contexts.require_asked()
    return found


def _continued(model: Any, inputs: Inputs, **how: Any) -> tuple[Tensor, Tensor]:
    logits = model(inputs.tensors["ids"], **how).logits
    return weighed(logits, inputs.targets, inputs.bucket.policy or DEFAULT_CLIP)


def _numbered(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


@torch.no_grad()
def _read(model: Any, ids: Tensor, **layout: Any) -> Any:
    return model(ids, use_cache=True, logits_to_keep=1, **layout)


def _caches(model: Any, inputs: Inputs) -> dict[str, Any]:
    """What each sample's context leaves, by argument."""
    t, bucket = inputs.tensors, inputs.bucket
    if not bucket.contexts:
        return {}
    ids, layout = t["context_ids"], dict[str, Any]()
    if bucket.padding != "none":
        places = _numbered(ids[0]) - (bucket.context_width - t["context_lengths"])
        ids = ids.gather(1, places.clamp(min=0))
        layout = {"attention_mask": (places >= 0).long(), "position_ids": places.clamp(min=0)}
    if bucket.padding == "any":
        # A window's own cache copies a number of the host's, which no graph can.
        layout["past_key_values"] = DynamicCache()
    answer = _read(model, ids, **layout)
    caches = {name: for_backward(cache) for name, cache in caches_of(answer).items()}
    for cache in caches.values() if bucket.selects else ():
        cache.batch_select_indices(t["context_rows"][0])
    return caches


def _seen(inputs: Inputs) -> Tensor:
    """1 at all but the padding on a context's left: int64 [samples, both widths]."""
    lengths, context = inputs.tensors["lengths"], inputs.bucket.context_width
    places = torch.arange(context + inputs.bucket.learned_width, device=lengths.device)
    return (places >= context - lengths).long()

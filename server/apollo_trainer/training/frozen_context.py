"""The forward passes of a micro-batch: contexts without gradient, continuations over them with it.

Contexts are padded on their left and continuations on their right, so that a row's real tokens
are neighbours, which is what sliding windows count in. A token never attends to the padding on
its right, and the mask hides that on its left. Only public arguments of transformers' models and
caches are used.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from apollo_trainer.training.batch import MicroBatch, TokenIds, rows_of

PADDING_ID = 0  # what stands there is never seen: any token does
# What transformers' classes call the thing that continues a text, in answers and arguments.
CACHES = ("past_key_values", "cache_params")


@dataclass
class FrozenContexts:
    """Keys and values of the contexts at hand, under the weights as they are now.

    Made anew for each step: after an update they would be those of older weights.
    """

    model: Any
    _contexts: tuple[TokenIds, ...] = ()
    _caches: dict[str, Any] = field(default_factory=dict)

    def rows_for(self, batch: MicroBatch) -> dict[str, Any]:
        """The caches for one forward, by the model's argument, with a row for each sample.

        Empty where no context is frozen. A forward changes the cache that it is given, also with
        use_cache=False: where the next micro-batch needs it, too, this returns a copy.
        """
        if not batch.context_width:
            return {}
        if batch.contexts != self._contexts:
            self._contexts, self._caches = batch.contexts, _run(self.model, batch)
        caches = copy.deepcopy(self._caches) if batch.keeps_contexts else self._caches
        if not batch.keeps_contexts:
            self._contexts, self._caches = (), {}
        if batch.context_rows != tuple(range(len(batch.contexts))):
            rows = torch.tensor(batch.context_rows, device=self.model.device)
            for cache in caches.values():
                cache.batch_select_indices(rows)
        return {name: for_backward(cache) for name, cache in caches.items()}


def caches_of(answer: Any) -> dict[str, Any]:
    """The caches in a model's answer, by the name of the argument that takes each."""
    return {name: answer[name] for name in CACHES if answer.get(name) is not None}


def for_backward(cache: Any) -> Any:
    """Makes the cache of a context fit for a forward with gradient, and returns it.

    A forward overwrites recurrent states that its backward still needs. Marked as not initialized,
    they are written to new memory instead.
    """
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            made = layer.is_recurrent_states_initialized
            made.update(dict.fromkeys(made, False))
    return cache


def batch_logits(model: Any, batch: MicroBatch, contexts: FrozenContexts) -> Tensor:
    """Logits that predict each continuation token: [samples, learned_width, V].

    Beyond a sample's own continuation they mean nothing.
    """
    caches = contexts.rows_for(batch)
    inputs = [inputs for inputs, _ in rows_of(batch)]
    rows = [padded(ids, batch.learned_width) for ids in inputs]
    ids = torch.tensor(rows, device=model.device)
    layout = _continuation_layout(batch, inputs, model.device)
    logits: Tensor = model(ids, use_cache=bool(caches), **caches, **layout).logits
    return logits


def _run(model: Any, batch: MicroBatch) -> dict[str, Any]:
    """The caches of a micro-batch's distinct contexts, a row each."""
    width, device = batch.context_width, model.device
    ids = torch.tensor(
        [(PADDING_ID,) * (width - len(c)) + c for c in batch.contexts], device=device
    )
    layout = {}
    if any(len(context) < width for context in batch.contexts):
        mask = _seen(torch.tensor([len(c) for c in batch.contexts], device=device), width)
        layout = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        return caches_of(model(ids, use_cache=True, logits_to_keep=1, **layout))


def _continuation_layout(
    batch: MicroBatch, inputs: list[TokenIds], device: Any
) -> dict[str, Tensor]:
    """Mask and positions of the rows; none where no context is padded: the model's own then do."""
    width = batch.context_width
    if all(len(context) == width for context in batch.contexts):
        return {}
    rows = [len(batch.contexts[row]) for row in batch.context_rows]
    lengths = torch.tensor(rows, device=device)
    places = torch.arange(batch.learned_width, device=device).expand(len(rows), -1)
    last = torch.tensor([len(ids) - 1 for ids in inputs], device=device)
    # Positions of padding stay within what a sample of its own reaches: a table of positions
    # ends there.
    positions = lengths[:, None] + torch.minimum(places, last[:, None])
    mask = torch.cat([_seen(lengths, width), torch.ones_like(places)], dim=1)
    return {"attention_mask": mask, "position_ids": positions}


def _seen(lengths: Tensor, width: int) -> Tensor:
    """1 at the tokens of contexts of these lengths, 0 at the padding on their left."""
    places = torch.arange(width, device=lengths.device)
    return (places >= width - lengths[:, None]).long()


def padded(ids: TokenIds, width: int) -> TokenIds:
    """Token ids with padding on their right."""
    return ids + (PADDING_ID,) * (width - len(ids))

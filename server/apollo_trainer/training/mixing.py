"""What one forward of a model may hold, found by trying it and never by the model's name."""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from apollo_trainer.parallel.vocabulary import everywhere, vocabulary_size
from apollo_trainer.training.batch import Mixing, TokenIds, plan_batches
from apollo_trainer.training.frozen_context import FrozenContexts, batch_logits
from apollo_trainer.training.loss import continuation_logits
from apollo_trainer.training.out_of_memory import is_out_of_memory, refusing_out_of_memory
from apollo_trainer.training.samples import TokenizedSample

log = logging.getLogger(__name__)
# Mean difference of logits over their spread: rounding stays below, another sample's tokens do not.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_16_BITS = 0.05
_SAME_LENGTH = ((1, 2, 3, 4), (5, 6)), ((1, 2, 3, 4), (7, 8, 9)), ((11, 12, 13, 4), (5,))
_PADDED = (*_SAME_LENGTH, ((6, 7), (8, 9, 10)), ((1, 2, 3, 4, 5, 6, 7), (3,)))
_PROBES = {Mixing.SAME_LENGTH: _SAME_LENGTH, Mixing.PADDED: _PADDED}
_found: weakref.WeakKeyDictionary[Any, Mixing] = weakref.WeakKeyDictionary()


def mixing_of(model: Any) -> Mixing:
    """The most that a forward of this model may hold, tried once with a few tokens.

    A model whose cache is more than keys and values, or whose samples see each other in one
    forward, runs one by one. Raises OutOfMemory; it is then tried again the next time.
    """
    if model not in _found:
        with refusing_out_of_memory():
            if not _computes(model):
                return Mixing.ONE
            tries = (m for m in (Mixing.PADDED, Mixing.SAME_LENGTH) if _works(model, m))
            _found[model] = next(tries, Mixing.ONE)
        log.info("samples in one forward: %s", _found[model].name)
    return _found[model]


def _works(model: Any, mixing: Mixing) -> bool:
    if mixing is Mixing.PADDED and not _takes(model, "attention_mask", "position_ids"):
        return False
    vocabulary = vocabulary_size(model)
    samples = [
        TokenizedSample(_within(vocabulary, context), _within(vocabulary, continuation))
        for context, continuation in _PROBES[mixing]
    ]
    try:
        with torch.no_grad():
            keeps = _holds_keys_and_values_only(model, samples[0].context_ids)
            return keeps and _agrees(model, samples, mixing)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        log.info("no %s forward: %s", mixing.name, error)
        return False


def _computes(model: Any) -> bool:
    """Whether logits are finite. If not, a try tells nothing, and is made again later."""
    with torch.no_grad():
        return everywhere(model, bool(continuation_logits(model, (1, 2), (3,)).isfinite().all()))


def _within(vocabulary: int, ids: TokenIds) -> TokenIds:
    return tuple(i % vocabulary for i in ids)


def _takes(model: Any, *names: str) -> bool:
    taken = inspect.signature(model.forward).parameters
    return all(name in taken for name in names)


def _holds_keys_and_values_only(model: Any, ids: tuple[int, ...]) -> bool:
    """Whether the cache has no recurrent state, which would take in padding and cannot be split."""
    cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in layers or ()
    )


def _agrees(model: Any, samples: list[TokenizedSample], mixing: Mixing) -> bool:
    """Whether one forward gives each sample the logits that it has alone."""
    (batch,) = plan_batches(samples, 10**6, mixing)
    together = batch_logits(model, batch, FrozenContexts(model))
    rows = ((together[n, : len(s.continuation_ids)], s) for n, s in enumerate(batch.samples))
    return all(
        everywhere(model, _same(row, continuation_logits(model, *_ids(s)))) for row, s in rows
    )


def _same(got: Tensor, alone: Tensor) -> bool:
    tolerance = TOLERANCE.get(alone.dtype, TOLERANCE_16_BITS)
    got, alone = got.float(), alone.float()
    return bool((got - alone).abs().mean() <= tolerance * alone.std())


def _ids(sample: TokenizedSample) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return sample.context_ids, sample.continuation_ids

"""What a training step needs of a CUDA device beside the weights, told before it is taken.

The passes and the optimizer's preparation run on a model without memory, and torch's allocator is
followed through what they make: nothing is a formula that a change of the passes would make wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from apollo_trainer.optim.cuda import FusedStepper, Work
from apollo_trainer.optim.cuda.kinds import W_DTYPES
from apollo_trainer.optim.factored import Gradient
from apollo_trainer.optim.options import StepSettings
from apollo_trainer.optim.parameters import Slot, new_state, sort_out
from apollo_trainer.optim.projection import normal_quantiles
from apollo_trainer.training.allocator import Allocations, CachingAllocator
from apollo_trainer.training.batch import MicroBatch, Mixing, plan_batches
from apollo_trainer.training.bucketed import Bucket, Inputs, losses
from apollo_trainer.training.frozen_context import FrozenContexts, caches_of
from apollo_trainer.training.gradients import Collected, StepGradients
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.options import StateShape
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.twin import Kernels

META = torch.device("meta")
_Graph = tuple[Collected, int]  # what the passes of a CUDA graph leave, and the bytes it holds
# What a device takes beside tensors, as measured on an H200: kernels' code that is not there from
# the attachment on, and for each graph cuBLAS's workspaces and each kernel's part.
CODE_BYTES, WORKSPACE_BYTES, KERNEL_BYTES = 50_000_000, 2 * 2**25, 20_000
# None of it decides how much memory a step takes.
_SETTINGS = StepSettings(1, 0, 200, 1e-5, (0.9, 0.999), 1e-8, 0.01, None, 1.01, "channel", None)


class StepMemory:
    """Bytes of a CUDA device that training takes beside the weights.

    Args:
        model: a twin.
        token_budget: of a micro-batch, as of a step's policy.

    Raises ValueError where plain torch steps the weights, and what a pass of the model raises that
    has to read a value.
    """

    def __init__(self, model: Any, state: StateShape, token_budget: int):
        self._model, self._shape, self._budget = model, state, token_budget
        self._slots = list(_slots(model, state))
        if not all(slot.param.dtype in W_DTYPES for slot in self._slots):
            raise ValueError("weights of float16 are stepped by plain torch")
        self._state = {s.param: new_state(s, state.rounding) for s in self._slots}
        self._mixing = _mixing(model)
        # Kept for as long as the process lives: not of the step that is told of first.
        normal_quantiles(META)

    @property
    def weights_bytes(self) -> int:
        """Of the parameters, tied ones once."""
        return sum(slot.param.nbytes for slot in self._slots)

    @property
    def state_bytes(self) -> int:
        """Of the Apollo state, which is there from the attachment on."""
        return sum(t.nbytes for state in self._state.values() for t in state.values())

    def step_bytes(self, samples: Sequence[TokenizedSample]) -> int:
        """What the device's memory grows by until steps of these samples have been taken.

        The first one runs as it is, what follows as CUDA graphs where they can be: the larger.
        """
        batches = plan_batches(samples, self._budget, self._mixing)
        return CODE_BYTES + max(self.captured(batches), self.as_it_is(batches))

    def as_it_is(self, batches: Sequence[MicroBatch]) -> int:
        """Bytes that a step of these micro-batches reserves without graphs."""
        allocator, contexts = CachingAllocator(), FrozenContexts(self._model)
        with Kernels(), Allocations(allocator):
            gradients = self._gradients(len(batches))
            for batch in batches:
                self._pass(gradients, partial(batch_loss, self._model, batch, contexts))
            self._prepare(gradients)
        return allocator.reserved

    def captured(self, batches: Sequence[MicroBatch]) -> int:
        """Bytes of the graphs of these micro-batches, and of what a step has beside them."""
        allocator, alone, graphs = CachingAllocator(), len(batches) == 1, dict[Bucket, _Graph]()
        gradients = self._gradients(len(batches))
        for batch in batches:
            bucket = Bucket.of(batch, "any" if self._mixing is Mixing.PADDED else "none")
            if bucket not in graphs:
                graphs[bucket] = self._graph(bucket)
            with Allocations(allocator):
                gradients.replay(graphs[bucket][0], copy=not alone)
        with Allocations(allocator):
            self._prepare(gradients)
        return allocator.reserved + sum(size for _, size in graphs.values())

    def _graph(self, bucket: Bucket) -> _Graph:
        """As passes are captured: with contexts apart, unless the model does not allow that."""
        if bucket.padding != "any":
            return self._captured(bucket, apart=False)
        try:
            return self._captured(bucket, apart=True)
        except (RuntimeError, TypeError):
            return self._captured(bucket, apart=False)

    def _captured(self, bucket: Bucket, *, apart: bool) -> _Graph:
        allocator, inputs, gradients = CachingAllocator(), Inputs(bucket, META), self._gradients()
        with Kernels(), Allocations(allocator) as seen:
            self._pass(gradients, partial(losses, self._model, inputs, apart=apart))
        size = allocator.reserved + WORKSPACE_BYTES + KERNEL_BYTES * seen.made
        return gradients.held, size

    def _pass(self, gradients: StepGradients, loss: Callable[[], tuple[Tensor, Tensor]]) -> None:
        with gradients.collecting():
            torch.autograd.backward([loss()[0]])

    def _gradients(self, passes: int = 1) -> StepGradients:
        return StepGradients(self._model.parameters(), passes)

    def _prepare(self, gradients: StepGradients) -> None:
        """What the optimizer sets aside; gone again when this returns."""
        found: dict[Tensor, Gradient] = gradients.settle()
        given = ((slot, slot.gradient(found)) for slot in self._slots)
        works = [Work(slot, g, self._state[slot.param]) for slot, g in given if g is not None]
        stepper = FusedStepper(META, self._shape.variant == "mini")
        stepper.prepare(works, [_SETTINGS], self._shape.rounding, True)


def _slots(model: Any, state: StateShape) -> Iterator[Slot]:
    # One by one: tensors without memory all lie at one address, and would be taken for ties.
    for named in model.named_parameters():
        yield from sort_out([named], (), 0, rank=state.rank, mode=state.rounding)[0]


@torch.no_grad()
def _mixing(model: Any) -> Mixing:
    """As `mixing_of` finds it by values where nothing is wrong with a model."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=META)
    with Kernels():
        caches = caches_of(model(ids, use_cache=True))
    layers = getattr(caches.get("past_key_values"), "layers", ())
    keys = [
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in layers
    ]
    return Mixing.PADDED if keys and all(keys) else Mixing.ONE

"""A CUDA graph of a micro-batch's passes, which must say what the passes themselves say.

Everything here runs on the training thread.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.optim.factored import norm_of
from apollo_trainer.training.batch import MicroBatch, Mixing, plan_batches
from apollo_trainer.training.bucketed import Bucket, Inputs, Padding, losses
from apollo_trainer.training.device_part import DevicePart
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.gradients import Collected, StepGradients, backward
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.out_of_memory import is_out_of_memory
from apollo_trainer.training.samples import TokenizedSample

log = logging.getLogger(__name__)
# Of the losses and of the gradient's norm: rounding stays below, what was not computed does not.
TOLERANCE = 0.05
_WARM_UPS = 2


@dataclass
class Graph:
    """One captured pass; its tensors are overwritten by each replay.

    Attributes:
        sums: of each sample's token losses and figures, float32, see `weighed`.
        size: bytes of the device that it holds.
    """

    inputs: Inputs
    graph: torch.cuda.CUDAGraph
    sums: Tensor
    collected: Collected
    size: int


class SaysOtherwise(RuntimeError):
    """A graph's losses or gradients are not those of the passes."""


class Capture:
    """Captures passes of one model, whose parameters stay where they are in memory."""

    def __init__(self, model: Any, part: DevicePart | None = None):
        self._model, self._part = model, part
        self._apart = True  # contexts are, until the model turns out not to allow it

    def compile(self, padding: Padding) -> None:
        """Runs a few tokens, which compiles what passes are made of."""
        sample = TokenizedSample((1,) * 33, (1,) * 16)
        (batch,) = plan_batches([sample], 1, Mixing.PADDED)
        inputs = Inputs(Bucket.of(batch, padding), self._model.device)
        inputs.fill(batch, 1.0)
        try:
            self._pass(inputs)
        except Exception as error:
            # The first capture meets the same error, and refuses with it.
            log.info("no kernels are compiled ahead: %s: %s", type(error).__name__, error)
        free_unused()

    def of(self, bucket: Bucket, batch: MicroBatch, divisor: float) -> Graph | None:
        """A bucket's graph; None where losses or gradients are not finite: they prove no graph.

        Args:
            batch: of that bucket; its passes run as they are, and then as the graph, both with
                cross-entropy for every loss.
            divisor: of all weights.

        Raises SaysOtherwise where the graph computes something else, or any error of the passes.
        """
        inputs = Inputs(bucket, self._model.device)
        # A divergence of about 0 proves nothing, and its gradient is another's noise.
        batch = replace(batch, samples=tuple(sample.plain for sample in batch.samples))
        inputs.fill(batch, divisor)
        said = self._as_it_is(batch, divisor)
        return self._agreeing(inputs, said) if all(map(math.isfinite, said)) else None

    def _agreeing(self, inputs: Inputs, said: list[float]) -> Graph:
        """A graph that computes what the passes did; contexts are apart if the model allows it."""
        if self._is_apart(inputs):
            try:
                return self._tried(inputs, said)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                torch.cuda.synchronize()
                log.info("contexts are not kept apart: %s: %s", type(error).__name__, error)
                self._apart = False
        free_unused()
        return self._tried(inputs, said)

    def _tried(self, inputs: Inputs, said: list[float]) -> Graph:
        self._warm_up(inputs)
        held = self._captured(inputs)
        held.graph.replay()
        if not _agree(said, self._said(held.sums, held.collected)):
            raise SaysOtherwise("a graph said something else than the passes")
        return held

    def _as_it_is(self, batch: MicroBatch, divisor: float) -> list[float]:
        """What the micro-batch says that is not padded."""
        with self._collecting() as collected:
            weighted, sums = batch_loss(self._model, batch, FrozenContexts(self._model), divisor)
            backward(weighted)
        return self._said(sums, collected)

    def _warm_up(self, inputs: Inputs) -> None:
        side: Any = self._stream(inputs) or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._pass(inputs)
        torch.cuda.current_stream().wait_stream(side)

    def _captured(self, inputs: Inputs) -> Graph:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
        # Other threads copy weights meanwhile; what they ask of the device is no part of this.
        with torch.cuda.graph(
            graph, stream=self._stream(inputs), capture_error_mode="thread_local"
        ):
            sums, collected = self._pass(inputs)
        return Graph(inputs, graph, sums, collected, torch.cuda.memory_reserved() - before)

    def _stream(self, inputs: Inputs) -> Any | None:
        """Of the part that its kernels run on, also where they are replayed on another's stream."""
        return self._part.stream if self._part and inputs.bucket.on_part else None

    def _is_apart(self, inputs: Inputs) -> bool:
        return self._apart and inputs.bucket.padding == "any"

    def _pass(self, inputs: Inputs) -> tuple[Tensor, Collected]:
        with self._collecting() as collected:
            weighted, sums = losses(self._model, inputs, apart=self._is_apart(inputs))
            backward(weighted)
        return sums, collected

    @contextmanager
    def _collecting(self) -> Iterator[Collected]:
        """Around passes of the model: what they leave."""
        gradients = StepGradients(self._model.parameters())
        with gradients.collecting():
            yield gradients.held

    @torch.no_grad()
    def _said(self, sums: Tensor, collected: Collected) -> list[float]:
        """The gradient's norm, and each sample's loss."""
        gradients = StepGradients(self._model.parameters())
        gradients.replay(collected, copy=False)
        norms = [float(norm_of(gradient)) for gradient in gradients.settle().values()]
        return [math.hypot(*norms), *sums[0].tolist()]


def free_unused() -> None:
    """Gives memory that no tensor holds back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def _agree(said: list[float], again: list[float]) -> bool:
    return all(
        math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for one, other in zip(said, again, strict=True)
    )

"""Forward and backward passes of whole micro-batches as CUDA graphs, one for each bucket.

A step of a few hundred tokens is ten thousand small kernels, and Python launches them slower than
a GPU runs them. A graph is captured when a bucket comes for the second time, and must then say what
the passes themselves said; what cannot be captured runs as it did, and is told of once.

Everything here runs on the training thread.
"""

from __future__ import annotations

import gc
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.optim.factored import norm_of
from apollo_trainer.training.attention import use_grouped_attention
from apollo_trainer.training.batch import MicroBatch, Mixing
from apollo_trainer.training.bucketed import Bucket, Inputs, losses
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.gradients import Collected, StepGradients
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.norms import fuse_norms
from apollo_trainer.training.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)
# Of the losses and of the gradient's norm: rounding stays below, what was not computed does not.
TOLERANCE = 0.05
_WARM_UPS = 2
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_size")
_MOST = 16
# Of what is free on the card and what graphs hold: the rest is for steps that run as they are.
_SHARE = 0.5


def speed_up(model: Any) -> None:
    """Fewer and faster kernels for a model on a GPU, where it computes what they do."""
    norms, grouped, rotary = fuse_norms(model), use_grouped_attention(model), False
    with suppress(ImportError):
        from apollo_trainer.training.rotary import fuse_rotary

        rotary = fuse_rotary(model) > 0
    log.info("kernels: %d RMS norms, rotary %s, grouped attention %s", norms, rotary, grouped)


@dataclass
class _Graph:
    """One captured pass; its tensors are overwritten by each replay."""

    inputs: Inputs
    graph: torch.cuda.CUDAGraph
    sums: Tensor
    collected: Collected
    size: int  # bytes of the device that it holds


class CapturedPasses:
    """Takes micro-batches of one model, whose parameters stay where they are in memory.

    Attributes:
        refusal: why this model's passes are not captured; empty while they may be.
    """

    def __init__(self, model: Any):
        self._model = model
        self._graphs: dict[Bucket, _Graph] = {}
        self._uses: Counter[Bucket] = Counter()
        self._refused: set[Bucket] = set()
        self.refusal = ""

    def __len__(self) -> int:
        """Graphs that are held."""
        return len(self._graphs)

    def take(
        self, batch: MicroBatch, divisor: float, gradients: StepGradients, *, alone: bool
    ) -> Tensor | None:
        """Replays a micro-batch's passes; None where they have to run as they are.

        Args:
            divisor: of all weights.
            gradients: takes what the passes leave.
            alone: no other micro-batch is taken before the gradients are used.

        Returns the sums of each sample's token losses, float32 [samples].
        """
        held = None if batch.keeps_contexts else self._graph_of(batch, divisor)
        if held is None:
            return None
        held.inputs.fill(batch, divisor)
        held.graph.replay()
        gradients.replay(held.collected, copy=not alone)
        return held.sums if alone else held.sums.clone()

    def _graph_of(self, batch: MicroBatch, divisor: float) -> _Graph | None:
        bucket = Bucket.of(batch)
        self._uses[bucket] += 1
        wanted = self._uses[bucket] > 1 and bucket not in self._graphs
        if wanted and not self.refusal and bucket not in self._refused:
            self._capture(bucket, batch, divisor)
        return self._graphs.get(bucket)

    def _capture(self, bucket: Bucket, batch: MicroBatch, divisor: float) -> None:
        if mixing_of(self._model) is not Mixing.PADDED:
            self._refuse("this model's samples cannot be padded")
            return
        if bucket.context_width + bucket.learned_width > _window(self._model):
            # A window counts the places between, which the padding would be.
            self._refused.add(bucket)
            log.info("no graph of %s: it is wider than what the model attends to", bucket)
            return
        inputs = Inputs(bucket, self._model.device)
        inputs.fill(batch, divisor)
        try:
            said = self._as_it_is(batch, divisor)
            if not all(map(math.isfinite, said)):
                # It tells nothing about the model: the weights may be restored, and are tried then.
                return
            self._warm_up(inputs)
            held = self._captured(inputs)
            held.graph.replay()
            if _agree(said, self._said(held.sums, held.collected)):
                self._keep(bucket, held)
            else:
                self._refuse("a graph said something else than the passes")
        except Exception as error:
            self._failed(bucket, error)
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    def _as_it_is(self, batch: MicroBatch, divisor: float) -> list[float]:
        """What the micro-batch says that is not padded."""
        with self._collecting() as collected:
            loss = batch_loss(self._model, batch, FrozenContexts(self._model), divisor)
            torch.autograd.backward([loss.weighted])
        return self._said(loss.sums, collected)

    def _warm_up(self, inputs: Inputs) -> None:
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._pass(inputs)
        torch.cuda.current_stream().wait_stream(side)

    def _captured(self, inputs: Inputs) -> _Graph:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
        # Other threads copy weights meanwhile; what they ask of the device is no part of this.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            sums, collected = self._pass(inputs)
        return _Graph(inputs, graph, sums, collected, torch.cuda.memory_reserved() - before)

    def _pass(self, inputs: Inputs) -> tuple[Tensor, Collected]:
        with self._collecting() as collected:
            weighted, sums = losses(self._model, inputs)
            torch.autograd.backward([weighted])
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
        norms = [norm_of(gradient) for gradient in gradients.settle().values()]
        return [float(torch.linalg.vector_norm(torch.stack(norms))), *sums.tolist()]

    def _failed(self, bucket: Bucket, error: Exception) -> None:
        torch.cuda.synchronize()
        if is_out_of_memory(error):
            self._refused.add(bucket)
            log.info("there is no memory for a graph of %s", bucket)
        else:
            self._refuse(f"{type(error).__name__}: {error}")

    def _keep(self, bucket: Bucket, held: _Graph) -> None:
        """Keeps a graph, and lets go of those that came least often where they hold too much."""
        self._graphs[bucket] = held
        free, _ = torch.cuda.mem_get_info()
        sizes = {each: graph.size for each, graph in self._graphs.items()}
        most = _SHARE * (free + sum(sizes.values()))
        while len(sizes) > _MOST or (sum(sizes.values()) > most and len(sizes) > 1):
            least = min(sizes.keys() - {bucket}, key=lambda each: self._uses[each])
            del sizes[least], self._graphs[least]

    def let_go(self) -> bool:
        """Frees the memory of all graphs; returns whether there were any."""
        held = bool(self._graphs)
        self._graphs.clear()
        gc.collect()
        torch.cuda.empty_cache()
        return held

    def _refuse(self, why: str) -> None:
        self._graphs.clear()
        self.refusal = f"Steps run without CUDA graphs, and slower: {why}."
        log.warning("%s", self.refusal)


def _window(model: Any) -> float:
    """Places that each layer of a model attends to at least."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in _WINDOWS]
    return min((w for w in found if isinstance(w, int) and w > 0), default=math.inf)


def _agree(said: list[float], again: list[float]) -> bool:
    return all(
        math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for one, other in zip(said, again, strict=True)
    )

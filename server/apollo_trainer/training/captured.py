"""Forward and backward passes of whole micro-batches as CUDA graphs, one for each bucket.

A step of a few hundred tokens is ten thousand small kernels, and Python launches them slower than
a GPU runs them. A graph is captured when a bucket comes for the second time, and must then say what
the passes themselves said; what cannot be captured runs as it did, and the status says why.

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
from apollo_trainer.training.batch import MicroBatch, Mixing, plan_batches
from apollo_trainer.training.bucketed import Bucket, Inputs, losses
from apollo_trainer.training.frozen_context import FrozenContexts
from apollo_trainer.training.gradients import Collected, StepGradients
from apollo_trainer.training.loss import batch_loss
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.norms import fuse_norms
from apollo_trainer.training.out_of_memory import is_out_of_memory
from apollo_trainer.training.samples import TokenizedSample

log = logging.getLogger(__name__)
# Of the losses and of the gradient's norm: rounding stays below, what was not computed does not.
TOLERANCE = 0.05
_WARM_UPS = 2
# Of a refused bucket: it is tried again when so much more memory is free than it was then.
_MORE = 1.25
_MOST = 16
# Of what is free on the card and what graphs hold: the rest is for steps that run as they are.
_SHARE = 0.5


def speed_up(model: Any) -> None:
    """Fewer and faster kernels for a model on a GPU, where it computes what they do.

    They are compiled here, in seconds where no compiled ones are kept, and not in a run.
    """
    norms, grouped, gated, rotary = fuse_norms(model), use_grouped_attention(model), 0, False
    with suppress(ImportError):
        from apollo_trainer.training.kernels.gated import fuse_gated
        from apollo_trainer.training.kernels.rotary import fuse_rotary

        gated, rotary = fuse_gated(model), fuse_rotary(model) > 0
    if model.device.type == "cuda" and mixing_of(model) is Mixing.PADDED:
        CapturedPasses(model).compile()
    log.info(
        "kernels: %d RMS norms, %d gated MLPs, rotary %s, grouped attention %s",
        norms, gated, rotary, grouped,
    )  # fmt: skip


@dataclass
class _Graph:
    """One captured pass; its tensors are overwritten by each replay."""

    inputs: Inputs
    graph: torch.cuda.CUDAGraph
    sums: Tensor
    collected: Collected
    size: int  # bytes of the device that it holds


@dataclass(frozen=True)
class _Refused:
    """A bucket that has no graph, and what was free when it was refused; infinite for good."""

    why: str
    free: float  # bytes of the device


class _SaysOtherwise(RuntimeError):
    """Losses or a gradient are not those of the passes."""


class CapturedPasses:
    """Takes micro-batches of one model, whose parameters stay where they are in memory."""

    def __init__(self, model: Any):
        self._model = model
        self._graphs: dict[Bucket, _Graph] = {}
        self._uses: Counter[Bucket] = Counter()
        self._refused: dict[Bucket, _Refused] = {}
        self._why = ""
        self._apart = True  # contexts are, until the model turns out not to allow it

    def __len__(self) -> int:
        """Graphs that are held."""
        return len(self._graphs)

    @property
    def refusal(self) -> str:
        """Why passes are not captured, one sentence; empty where all may be."""
        whys = sorted({refused.why for refused in self._refused.values()})
        if self._why or not whys:
            return self._why
        shapes = f"Steps of some shapes ({len(self._refused)})"
        return f"{shapes} run without CUDA graphs, and slower: {'; '.join(whys)}."

    def compile(self) -> None:
        """Runs a few tokens, which compiles what passes are made of."""
        sample = TokenizedSample((1,) * 33, (1,) * 16)
        (batch,) = plan_batches([sample], 1, Mixing.PADDED)
        inputs = Inputs(Bucket.of(batch), self._model.device)
        inputs.fill(batch, 1.0)
        try:
            self._pass(inputs)
        except Exception as error:
            # Whoever captures finds out what it forbids.
            log.info("no kernels are compiled ahead: %s: %s", type(error).__name__, error)
        _free_unused()

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
        if wanted and not self._why and self._may_try(bucket):
            self._refused.pop(bucket, None)
            self._capture(bucket, batch, divisor)
        return self._graphs.get(bucket)

    def _may_try(self, bucket: Bucket) -> bool:
        refused = self._refused.get(bucket)
        if refused is None or refused.free == math.inf:
            return refused is None
        return self._free() > _MORE * refused.free

    def _free(self) -> int:
        """Bytes of the device that a graph could take; what others hold it could not."""
        free, _ = torch.cuda.mem_get_info()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + unused - sum(graph.size for graph in self._graphs.values())

    def _capture(self, bucket: Bucket, batch: MicroBatch, divisor: float) -> None:
        if mixing_of(self._model) is not Mixing.PADDED:
            self._refuse("this model's samples cannot be padded")
            return
        if bucket.context_width + bucket.learned_width >= (places := _places(self._model)):
            why = f"from {places:.0f} places on this model's attention counts their padding"
            self._refuse_one(bucket, why, math.inf)
            return
        try:
            inputs = Inputs(bucket, self._model.device)
            inputs.fill(batch, divisor)
            said = self._as_it_is(batch, divisor)
            # What is not finite tells nothing of the model: weights may be restored, and are tried.
            if all(map(math.isfinite, said)):
                self._keep(bucket, self._agreeing(inputs, said))
        except Exception as error:
            self._failed(bucket, error)
        finally:
            _free_unused()

    def _agreeing(self, inputs: Inputs, said: list[float]) -> _Graph:
        """A graph that says what the passes said. Raises what forbids that."""
        if self._apart:
            try:
                return self._tried(inputs, said)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                torch.cuda.synchronize()
                log.info("contexts are not kept apart: %s: %s", type(error).__name__, error)
                self._apart = False
        _free_unused()
        return self._tried(inputs, said)

    def _tried(self, inputs: Inputs, said: list[float]) -> _Graph:
        self._warm_up(inputs)
        held = self._captured(inputs)
        held.graph.replay()
        if not _agree(said, self._said(held.sums, held.collected)):
            raise _SaysOtherwise("a graph said something else than the passes")
        return held

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
            weighted, sums = losses(self._model, inputs, apart=self._apart)
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
            # The error holds the tensors of where it was raised.
            error.__traceback__ = None
            _free_unused()
            why = "there is no memory for a graph of them, which is tried again when more is free"
            self._refuse_one(bucket, why, self._free())
        else:
            told = "" if isinstance(error, _SaysOtherwise) else f"{type(error).__name__}: "
            log.info("what forbids a graph", exc_info=error)
            self._refuse(f"{told}{error}")

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
        # What memory was refused to may find some now.
        for_good = {b: each for b, each in self._refused.items() if each.free == math.inf}
        self._refused = for_good
        _free_unused()
        return held

    def _refuse(self, why: str) -> None:
        self._graphs.clear()
        self._why = f"Steps run without CUDA graphs, and slower: {why}."
        log.warning("%s", self._why)

    def _refuse_one(self, bucket: Bucket, why: str, free: float) -> None:
        self._refused[bucket] = _Refused(why, free)
        log.info("no graph of %s: %s", bucket, why)


def _places(model: Any) -> float:
    """Within how many a model's attention is the same wherever in its row a token lies.

    Llama 4 scales queries by where they lie in the cache, and not by their positions.
    """
    config = model.config.get_text_config()
    scaled = getattr(config, "attn_temperature_tuning", False)
    return float(getattr(config, "floor_scale", math.inf)) if scaled else math.inf


def _free_unused() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _agree(said: list[float], again: list[float]) -> bool:
    return all(
        math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for one, other in zip(said, again, strict=True)
    )

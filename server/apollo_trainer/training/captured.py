"""Forward and backward passes of whole micro-batches as CUDA graphs, one for each bucket.

A step of a few hundred tokens is ten thousand small kernels, and Python launches them slower than
a GPU runs them. A graph is captured when a bucket comes for the second time; what cannot be
captured runs as it did, and the status says why.

Everything here runs on the training thread.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apollo_trainer.training.batch import MicroBatch, Mixing
from apollo_trainer.training.bucketed import Bucket, Padding
from apollo_trainer.training.capture import Capture, Graph, SaysOtherwise, free_unused
from apollo_trainer.training.device_part import DevicePart
from apollo_trainer.training.gradients import StepGradients
from apollo_trainer.training.mixing import mixing_of
from apollo_trainer.training.objectives import DEFAULT_CLIP, Clip
from apollo_trainer.training.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)
# A bucket that was refused for memory is tried again when this many times as much is free.
_MORE = 1.25
_MOST = 16
# Of free memory and what graphs hold, what graphs may hold: other steps need the rest.
_SHARE = 0.5


@dataclass(frozen=True)
class _Refused:
    """A bucket that has no graph, and what was free when it was refused; infinite for good."""

    why: str
    free: float  # bytes of the device


class CapturedPasses:
    """Takes micro-batches of one model, whose parameters stay where they are in memory.

    Args:
        part: of the GPU, for steps beside a vLLM that decodes; a graph is of it or of all.
    """

    def __init__(self, model: Any, part: DevicePart | None = None):
        self._model, self._capture, self._part = model, Capture(model, part), part
        self._graphs: dict[Bucket, Graph] = {}
        self._uses: Counter[Bucket] = Counter()
        self._refused: dict[Bucket, _Refused] = {}
        self._learning: Collection[int] = ()  # ids of the parameters that graphs have gradients of
        self._padding: Padding | None = None  # what the model allows; None until it was tried
        self._let_go = set[Bucket]()  # gave their memory to buckets that came more often
        self._why = ""

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

    def take(
        self,
        batch: MicroBatch,
        divisor: float,
        gradients: StepGradients,
        *,
        alone: bool,
        clip: Clip = DEFAULT_CLIP,
    ) -> Tensor | None:
        """Replays a micro-batch's passes; None where they have to run as they are.

        Args:
            divisor: of all weights.
            gradients: takes what the passes leave.
            alone: no other micro-batch is taken before the gradients are used.
            clip: of the samples with a policy loss.

        Returns the sums of each sample's tokens, see `weighed`.
        """
        self._follow(gradients)
        held = None if batch.keeps_contexts else self._graph_of(batch, divisor, clip)
        if held is None:
            return None
        held.inputs.fill(batch, divisor)
        held.graph.replay()
        gradients.replay(held.collected, copy=not alone)
        return held.sums if alone else held.sums.clone()

    def _follow(self, gradients: StepGradients) -> None:
        """Lets go of graphs whose gradients are of other parameters than now learn."""
        if gradients.params.keys() != self._learning:
            if self._graphs:
                self.let_go()
            self._learning = gradients.params.keys()

    def _graph_of(self, batch: MicroBatch, divisor: float, clip: Clip) -> Graph | None:
        bucket = Bucket.of(batch, self._padding or self._find_padding(), clip)
        bucket = replace(bucket, on_part=self._part is not None and self._part.entered)
        self._uses[bucket] += 1
        if bucket not in self._graphs and self._is_worth_it(bucket) and self._may_try(bucket):
            self._refused.pop(bucket, None)
            self._try(bucket, batch, divisor)
        return self._graphs.get(bucket)

    def _find_padding(self) -> Padding:
        padded = mixing_of(self._model) is Mixing.PADDED
        self._padding = "any" if padded else "left"
        return self._padding

    def _is_worth_it(self, bucket: Bucket) -> bool:
        """Whether it comes more often than a graph whose place it would take.

        Else that one would be captured again next, and each would push the other out.
        """
        full = len(self._graphs) >= _MOST or bucket in self._let_go
        least = min((self._uses[each] for each in self._graphs), default=0) if full else 0
        return self._uses[bucket] > max(1, 2 * least)

    def _may_try(self, bucket: Bucket) -> bool:
        if self._why:
            return False
        refused = self._refused.get(bucket)
        if refused is None or refused.free == math.inf:
            return refused is None
        return self._free() > _MORE * refused.free

    def _free(self) -> int:
        """Bytes of the device that a graph could take; what others hold it could not."""
        free, _ = torch.cuda.mem_get_info()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + unused - sum(graph.size for graph in self._graphs.values())

    def _try(self, bucket: Bucket, batch: MicroBatch, divisor: float) -> None:
        padded = bucket.context_width + bucket.learned_width if bucket.padding != "none" else 0
        if padded >= (places := _places(self._model)):
            why = f"from {places:.0f} places on this model's attention counts their padding"
            self._refuse_one(bucket, why, math.inf)
            return
        try:
            if (graph := self._capture.of(bucket, batch, divisor)) is not None:
                self._keep(bucket, graph)
        except Exception as error:
            self._failed(bucket, error)
        finally:
            free_unused()

    def _failed(self, bucket: Bucket, error: Exception) -> None:
        torch.cuda.synchronize()
        if is_out_of_memory(error):
            # The error holds the tensors of where it was raised.
            error.__traceback__ = None
            free_unused()
            why = "there is no memory for a graph of them, which is tried again when more is free"
            self._refuse_one(bucket, why, self._free())
        elif bucket.padding == "left":
            log.info("padding changes what the model says, or cannot be told of: %s", error)
            self._padding = "none"
        else:
            told = "" if isinstance(error, SaysOtherwise) else f"{type(error).__name__}: "
            log.info("what forbids a graph", exc_info=error)
            self._refuse(f"{told}{error}")

    def _keep(self, bucket: Bucket, held: Graph) -> None:
        """Keeps a graph, and lets go of those that came least often where they hold too much."""
        self._graphs[bucket] = held
        self._let_go.discard(bucket)
        free, _ = torch.cuda.mem_get_info()
        sizes = {each: graph.size for each, graph in self._graphs.items()}
        most = _SHARE * (free + sum(sizes.values()))
        while len(sizes) > _MOST or (sum(sizes.values()) > most and len(sizes) > 1):
            least = min(sizes.keys() - {bucket}, key=lambda each: self._uses[each])
            del sizes[least], self._graphs[least]
            self._let_go.add(least)

    def let_go(self) -> bool:
        """Frees the memory of all graphs; returns whether there were any."""
        held = bool(self._graphs)
        self._graphs.clear()
        # What memory was refused to may find some now.
        for_good = {b: each for b, each in self._refused.items() if each.free == math.inf}
        self._refused = for_good
        free_unused()
        return held

    def _refuse(self, why: str) -> None:
        self._graphs.clear()
        self._why = f"Steps run without CUDA graphs, and slower: {why}."
        log.warning("%s", self._why)

    def _refuse_one(self, bucket: Bucket, why: str, free: float) -> None:
        self._refused[bucket] = _Refused(why, free)
        log.info("no graph of %s: %s", bucket, why)


def _places(model: Any) -> float:
    """Up to which width of a row padding does not change a model's attention.

    Llama 4 scales queries by their place in the cache, padding included, not by their positions.
    """
    config = model.config.get_text_config()
    scaled = getattr(config, "attn_temperature_tuning", False)
    return float(getattr(config, "floor_scale", math.inf)) if scaled else math.inf

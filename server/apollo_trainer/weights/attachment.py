"""One engine's live weights, attached: whether they may be written to, and by which names."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.generation import FIRST, SharedGeneration
from apollo_grpc.region import Region
from apollo_trainer.parallel.ranks import ALONE, Ranks
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.fingerprint import fingerprint, sample
from apollo_trainer.weights.liveness import Liveness
from apollo_trainer.weights.mapping import Mapping, MemoryUse, measure
from apollo_trainer.weights.producer import Producer
from apollo_trainer.weights.verify import FLOOR_NATS

CHANGED_BY_OTHERS = (
    "Somebody else changed vLLM's weights since they were attached (a reload, a weight transfer, a "
    "sleep), and nothing was written to them since. They are attached again by themselves. Then a "
    "run is taken if they are those of the Apollo state, else with accept_other_weights or "
    "reset_optimizer."
)


@dataclass
class Attachment:
    """One engine's live weights as a transformers model.

    Attributes:
        epoch: of the engine process; with another one all of this is dead.
        directory: the model directory that vLLM serves.
        model: transformers model whose parameters are the live weights.
        plan: how parameters make checkpoint tensors.
        derived: parameters that vLLM computes other values of; they are buffers here.
        producer: the process that owns the memory.
        regions: which part of each parameter this rank has.
        ranks: that train this engine's model together.
        computed_by: a sentence on who computes what of the model, or what is slow; may be empty.
        logprob_difference: between both sides when attached, in nats.
        allowed: how far apart rounding brings right scores, as `verify.allowed`; as last measured.
        liveness: what a probe found; None where none was made.
        rank_ended: which of the trainer's ranks ended, in a sentence; empty where none did.
        generation: how often others changed the weights; None where nobody tells.
        found_generation: that of the manifest.
        vllm_version: empty where the sidecar does not tell.
        lost: set once the engine is known to be gone, wedged, or not to be trusted.
        not_live: why it is not to be trusted; empty where it is.
    """

    epoch: str
    directory: str
    max_model_len: int
    weight_version: int
    model: Any
    plan: CheckpointPlan
    mappings: dict[int, Mapping]
    producer: Producer
    derived: list[str] = field(default_factory=list)
    regions: dict[str, Region] = field(default_factory=dict)
    ranks: Ranks = ALONE
    computed_by: str = ""
    logprob_difference: float = 0.0
    allowed: torch.Tensor = field(default_factory=lambda: torch.tensor(FLOOR_NATS))
    liveness: Liveness | None = None
    lost: threading.Event = field(default_factory=threading.Event)
    not_live: str = ""
    rank_ended: str = ""
    generation: SharedGeneration | None = None
    found_generation: int = FIRST
    vllm_version: str = ""
    _left: torch.Tensor | None = None
    _found_changed: bool = False

    @property
    def gone(self) -> bool:
        """Whether the engine is lost, or its process has ended."""
        return self.lost.is_set() or not self.producer.alive

    @property
    def changed_by_others(self) -> bool:
        """Whether somebody else has changed the weights, or begins to, since the manifest."""
        if self.generation is not None and self.generation.now != self.found_generation:
            self._found_changed = True
        return self._found_changed

    @property
    def alive(self) -> bool:
        """Whether the engine may be written to: not gone, and its weights what was left there."""
        return not self.gone and not self.changed_by_others

    def remember(self) -> None:
        """The weights are now as this server leaves them."""
        if self.alive:
            self._left = sample(self.parameters())

    def require_as_left(self) -> None:
        """Compares some values of each parameter with those that `remember` saw.

        Raises FailedPrecondition with WEIGHTS_CHANGED where they are others.
        """
        if self._left is not None and not self.changed_by_others:
            self._found_changed = not torch.equal(self._left, sample(self.parameters()))
        self.require_live()

    def distrust(self, why: str) -> None:
        """From now on nothing is written, and nothing taken from the weights."""
        self.not_live = why
        self.lost.set()

    def require_live(self) -> None:
        """Raises FailedPrecondition where vLLM computes with other weights than were left."""
        if self.not_live:
            raise FailedPrecondition(self.not_live, reason="WEIGHTS_NOT_LIVE")
        if self.changed_by_others and not self.gone:
            raise FailedPrecondition(CHANGED_BY_OTHERS, reason="WEIGHTS_CHANGED")

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The live parameters by name, tied ones once."""
        return dict(self.model.named_parameters())

    def whole_bytes(self) -> int:
        """Bytes of the parameters, the parts of all ranks together."""
        sizes = {name: math.prod(region.root) for name, region in self.regions.items()}
        own = self.parameters().items()
        return sum(sizes.get(name, p.numel()) * p.element_size() for name, p in own)

    def checkpoint(self) -> CheckpointReader:
        """The live weights by the names of the model directory."""
        return CheckpointReader(self.plan, self.parameters(), self.regions, self.ranks)

    def fingerprint(self) -> str:
        """The digest of all weights."""
        self.ranks.tell("fingerprint")
        return fingerprint(self.parameters(), self.regions, self.ranks)

    def synchronize(self) -> None:
        """Waits until every write has arrived: before that vLLM must not go on."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def told_liveness(self) -> str:
        """For the status: what a probe saw of vLLM, or that there was none."""
        return str(self.liveness or "")

    def memory(self) -> MemoryUse:
        """Where the parameters lie, measured now."""
        return measure(list(self.parameters().values()), self.mappings.values())

"""Shows that vLLM computes with what is written: a change of the live bytes moves both sides alike.

That both sides agree when attached is no proof. An engine that computes with copies of its weights
agrees until the first update, and never learns of one. So for each *kind* of vLLM's tensors, names
with their numbers left out, some bytes are changed in all layers, both sides score the same tokens,
and the bytes are put back, by the sidecar, which alone keeps what they were.

A kind is proven when the training model moved and vLLM came after it, to within a tenth of the way
and what rounding explains. It is refused when vLLM stayed further behind. It is unproven when no
change moved the training model by enough to tell: then these scores do not depend on it, as on a
bias that a softmax cancels. Of matrices that is refused, since they are what engines copy. A vector
is named; what a run makes of it is compared when the run has ended.

The proof is for the kind: of many layers, one alone that is a copy may hide among the others.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.parallel.ranks import ALONE, Ranks
from apollo_trainer.weights import mapping
from apollo_trainer.weights.checkpoint_reader import same_bytes
from apollo_trainer.weights.live_view import LiveView
from apollo_trainer.weights.manifest import refusal
from apollo_trainer.weights.probed_bytes import RowsRead, change_of, read_bytes
from apollo_trainer.weights.sidecar import Sidecar
from apollo_trainer.weights.verify import (
    FLOOR_NATS,
    allowed,
    log_probabilities,
    noise_of,
    quantiles,
    weights_dtype,
)

log = logging.getLogger(__name__)
# Times as far as both sides end up apart.
FAR = 10.0
# Rows of each tensor, and noise in units of its values: as little as shows it, then more.
STRENGTHS = ((4, 2.0), (16, 4.0), (64, 8.0), (256, 16.0))
# For matrices alone, which are refused without a proof: what one does in a model may be small
# beside what rounding does, as attention's part is in random weights of many layers.
LAST_STRENGTHS = ((256, 64.0), (1024, 256.0))
POLL_SECONDS = 5e-4
# What both sides take for a change, and the noise of the model, in scores of the training model.
SCORES_OF_A_CHANGE = 10
# The sidecar grants no longer lease.
LONGEST_LEASE_SECONDS = 60.0
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# What the first rank has all ranks do, with the same weights each.
_END, _SCORE, _ROUND = 0.0, 1.0, 2.0
# Somebody else paused vLLM, or scored with it, meanwhile: another attempt may find it free.
_PASSING = {"LEASE_HELD", "LEASE_ENDED", "SCORE_FIRST"}


@dataclass
class Liveness:
    """Kinds of vLLM's tensors, by their names with `*` for numbers, and what it took."""

    proven: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        """For status and `doctor`."""
        told = f"vLLM was seen to compute with what is written, in {len(self.proven)} kinds of "
        told += "weight"
        if self.unproven:
            told += f"; no score depends on {', '.join(self.unproven)}, of which that is unknown"
        return f"{told}."


@dataclass(frozen=True)
class Probed:
    """What a probe needs of an attachment.

    Attributes:
        views: of the parameters of `model`, this rank's first, and of the other ranks' parts.
        mappings: of the buffers that this rank's lie in.
        token_ids: what both sides scored last.
        allowed: how far apart rounding brought their scores, as `verify.allowed`.
        lease_seconds: that one change and both scores of it may take, or more where the model is
            slow; vLLM goes on by itself, with the bytes put back, so long after this process was
            killed.
        ranks: that divide the weights.
    """

    epoch: str
    model: Any
    views: Sequence[LiveView]
    mappings: Mapping[int, mapping.Mapping]
    token_ids: list[int]
    allowed: torch.Tensor
    lease_seconds: float
    ranks: Ranks = ALONE


def probe_liveness(sidecar: Sidecar, probed: Probed) -> Liveness:
    """Probes every kind, vLLM paused meanwhile; the weights are as before at the end.
    On the first rank; the others call `follow_probe`. A kind is changed in all of them at once.

    Raises FailedPrecondition that names a kind which is not live, or of which it cannot be told;
    Unavailable where vLLM was paused or asked by others.
    """
    began, found = time.monotonic(), Liveness()
    try:
        probe = _Probe(sidecar, probed)
        with probe.lease():
            for kind, views in _kinds(probed.views).items():
                (found.proven if probe.is_proven(kind, views) else found.unproven).append(kind)
            probe.require_put_back()
    finally:
        with suppress(RuntimeError):  # a rank has ended
            probed.ranks.first([_END])
    found.seconds = time.monotonic() - began
    return found


def follow_probe(probed: Probed) -> None:
    """Computes on another rank what the first one's probe asks for."""
    while (asked := probed.ranks.first([_END])[0]) != _END:
        ours = torch.zeros(len(probed.token_ids) - 1)
        if asked == _SCORE:
            log_probabilities(probed.model, probed.token_ids)
        else:
            noise_of(probed.model, probed.token_ids, ours)()


def _kinds(views: Iterable[LiveView]) -> dict[str, list[LiveView]]:
    kinds: dict[str, list[LiveView]] = {}
    for view in views:
        kinds.setdefault(NUMBER.sub("*", view.tensor), []).append(view)
    return kinds


class _Probe:
    def __init__(self, sidecar: Sidecar, probed: Probed):
        self._sidecar, self._probed = sidecar, probed
        self._dtype = weights_dtype(probed.model)
        self._parameters = dict(probed.model.named_parameters())
        began = time.monotonic()
        with RowsRead() as read:
            self._before = self._ours()
        needed = SCORES_OF_A_CHANGE * (time.monotonic() - began)
        self._lease_seconds = min(max(probed.lease_seconds, needed), LONGEST_LEASE_SECONDS)
        head = probed.model.get_output_embeddings()
        if head is not None:
            # Only the rows of scored tokens are sure to move their scores.
            read.rows.setdefault(head.weight.data_ptr(), set()).update(probed.token_ids)
        rows, named = read.rows, self._parameters.items()
        self._rows_read: dict[str, set[int]] = {n: rows.get(p.data_ptr(), set()) for n, p in named}
        self._lease_id, self._until = uuid.uuid4().hex, 0.0
        self._touched: list[tuple[LiveView, pb.WeightChange, torch.Tensor]] = []

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Ends what the first change begins; vLLM goes on with the bytes put back."""
        try:
            yield
        except FailedPrecondition as error:
            if error.reason not in _PASSING:
                raise
            raise Unavailable(f"A probe of vLLM's weights was cut off: {error.message}") from error
        finally:
            # A lease that cannot be ended runs out, and its end puts the bytes back, too.
            with suppress(ApolloError):
                self._sidecar.resume(self._probed.epoch, self._lease_id, weights_changed=False)

    def is_proven(self, kind: str, views: list[LiveView]) -> bool:
        """Whether vLLM moved with the training model. Raises as `probe_liveness`."""
        is_matrix = any(sum(size > 1 for size in view.shape) > 1 for view in views)
        strengths = (*STRENGTHS, *LAST_STRENGTHS) if is_matrix else STRENGTHS
        for level, (rows, deviation) in enumerate(strengths):
            if level:
                # What is read as the bytes of before would be those of the change before.
                self._engine_with([])
            ours, engine = self._both_with(self._changes(views, rows, deviation))
            if time.monotonic() >= self._until:
                raise Unavailable(
                    f"The pause of {self._lease_seconds:.3g} s ran out while vLLM's weights "
                    "were probed; they are as they were. Is the machine busy, or the setting "
                    "lease_seconds too short for this model?"
                )
            if not ours.isfinite().all():
                break
            if self._came_along(kind, ours, engine):
                return True
        if is_matrix:
            raise refusal(
                "LIVENESS_UNPROVEN",
                f"No change of {kind} moves the model's scores, so that it cannot be told whether "
                "vLLM computes with what is written there. Start the training server with "
                "--no-probe-weights if you know that it does.",
            )
        log.warning("no change of %s moves the scores: whether vLLM has a copy is unknown", kind)
        return False

    def _came_along(self, kind: str, ours: torch.Tensor, engine: torch.Tensor) -> bool:
        """Whether it is seen; False where the move was too short. Raises where vLLM stayed."""
        moved, apart, explained = self._compared(ours, engine)
        if not explained:
            # Ours may have been begun before all of the change was there.
            moved, apart, explained = self._compared(self._ours(), engine)
        if explained:
            return bool((moved >= FAR * apart.clamp(min=FLOOR_NATS)).any())
        theirs = quantiles((engine - self._before).abs(), self._dtype)
        raise refusal(
            "WEIGHTS_NOT_LIVE",
            f"vLLM does not compute with what is written into {kind}: a change of it moved the "
            f"training model's log-probabilities by {float(moved[0]):.3g} nats at the median, and "
            f"vLLM's by {float(theirs[0]):.3g}. It keeps a copy of this weight, or rearranges it "
            "as it loads.",
        )

    def _compared(
        self, ours: torch.Tensor, engine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """How far the training model moved, how far apart both are, and if rounding explains it."""
        moved = quantiles((ours - self._before).abs(), self._dtype)
        apart = quantiles((ours - engine).abs(), self._dtype)
        explained = any(bool((apart <= limits).all()) for limits in self._explained(ours))
        return moved, apart, explained

    def _explained(self, ours: torch.Tensor) -> Iterator[torch.Tensor]:
        """How far apart rounding may bring both sides, first what takes no time to know."""
        yield torch.tensor(FLOOR_NATS)
        yield self._probed.allowed
        # Of the weights as they are changed now: noise in them may have made the model noisier.
        self._probed.ranks.first([_ROUND])
        yield allowed(noise_of(self._probed.model, self._probed.token_ids, ours)(), self._dtype)

    def require_put_back(self) -> None:
        """Puts the last change back. Raises FailedPrecondition unless all bytes are as before."""
        self._engine_with([])
        for view, change, before in self._touched:
            if not same_bytes(self._read(view, change), before):
                raise refusal(
                    "PROBE_NOT_UNDONE",
                    f"The bytes of {view.tensor} that a probe changed were not put back as they "
                    "were. Restart vLLM.",
                )

    # --- both sides -------------------------------------------------------------------------

    def _ours(self) -> torch.Tensor:
        self._probed.ranks.first([_SCORE])
        return log_probabilities(self._probed.model, self._probed.token_ids)

    def _both_with(self, changes: list[pb.WeightChange]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ours with these changes, begun as soon as they are seen, and vLLM's: [T - 1] each."""
        view, change, before = self._touched[-1]
        with ThreadPoolExecutor(1) as other:
            asked = other.submit(self._engine_with, changes)
            while not asked.done() and same_bytes(self._read(view, change), before):
                time.sleep(POLL_SECONDS)
            return self._ours(), asked.result()

    def _engine_with(self, changes: list[pb.WeightChange]) -> torch.Tensor:
        """vLLM's scores [T - 1] with these changes, and with no others."""
        probed = self._probed
        self._until = time.monotonic() + self._lease_seconds
        scores = self._sidecar.probe(
            probed.epoch, self._lease_id, self._lease_seconds, probed.token_ids, changes
        )
        if len(scores) != len(self._before):
            raise refusal("LOGPROBS_DISAGREE", f"vLLM scored {len(scores)} tokens of a probe.")
        return torch.tensor(scores)

    def _changes(self, views: list[LiveView], rows: int, deviation: float) -> list[pb.WeightChange]:
        changes = []
        for view in views:
            read = self._rows_of(view)
            changes.append(change_of(view, self._parameters[view.name], rows, deviation, read))
            if view.rank == self._probed.ranks.rank:
                self._touched.append((view, changes[-1], self._read(view, changes[-1])))
        return changes

    def _rows_of(self, view: LiveView) -> set[int]:
        """Of a table, those that the scores depend on, by their places in this view."""
        read = self._rows_read[view.name]
        if not read or view.region.is_whole(0):
            return read
        tokens = set(self._probed.token_ids)
        return {place for place, row in enumerate(view.region.indices(0)) if row in tokens}

    def _read(self, view: LiveView, change: pb.WeightChange) -> torch.Tensor:
        return read_bytes(self._probed.mappings[view.buffer_id], view.dtype, change)

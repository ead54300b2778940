"""One vLLM engine as the sidecar uses it, from gRPC's threads."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apollo_grpc import process_state
from apollo_grpc.errors import ApolloError, FailedPrecondition, Unavailable
from apollo_grpc.generation import FIRST, SharedGeneration
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.leases import PauseLeases
from apollo_sidecar.other_writers import HELD
from apollo_sidecar.others_pause import WHO, OthersPause
from apollo_sidecar.own_requests import OwnRequests
from apollo_sidecar.token_times import Iteration, TokenTimes, listen
from apollo_sidecar.trainer_hold import TrainerHold
from apollo_sidecar.vllm_calls import VllmCalls
from apollo_sidecar.weight_version import WeightVersion

log = logging.getLogger("vllm.apollo")
# A watcher takes an engine that it has not heard of for five beats for wedged.
BEAT_SECONDS = 0.25
# The mode of a probe's pause: nobody else writes under it.
PROBE = "probe"
PUT_BACK_ATTEMPTS = 3
# The mode of a lease for writes while vLLM decodes.
NO_PAUSE = "none"


@dataclass(frozen=True)
class Generation:
    """What a watcher needs to know: of the exported weights, and of tokens since the last one."""

    epoch: str
    generation: int
    weight_version: int
    paused_by_others: bool
    iterations: list[Iteration]


class Engine:
    """Pause, resume, cache reset, weight version, export and scoring on one vLLM engine.

    Args:
        client: vLLM's AsyncLLM, and the event loop that it lives on, as of `VllmCalls`.
        weight_version: updates that were counted before.
        as_loaded: whether nobody can have written to the weights yet.

    Attributes:
        epoch: random for each engine process; another epoch means that every handle is dead.
        paused: whether vLLM was asked to pause by a lease and is not known to have gone on.
        hold: which training server this engine is bound to.
        vllm: calls on its event loop.
        requests: to be awaited there.
    """

    def __init__(
        self,
        client: Any,
        loop: asyncio.AbstractEventLoop,
        *,
        weight_version: int = 0,
        as_loaded: bool = True,
    ):
        self.epoch = uuid.uuid4().hex
        self.vllm, self.requests = VllmCalls(client, loop), OwnRequests(client)
        self._version = WeightVersion(self.vllm, weight_version, as_loaded=as_loaded)
        self._worker_pids = list[int]()
        # What an API server that ended left in the worker is not known.
        self._probed = not as_loaded
        self.paused, self.hold = False, TrainerHold(self._trainer_left)
        self._others, self._resumes = OthersPause(client, lambda: self.paused), 0
        self._generation: SharedGeneration | None = None
        self._token_times = TokenTimes()
        if not listen(client, self._token_times):
            log.info("apollo: vLLM measures no times between tokens; training sets no pace by them")
        self.leases = PauseLeases(self._pause, self._resume, self._version.tell, self._require_kept)

    def require_epoch(self, epoch: str) -> None:
        """Raises FailedPrecondition when the caller speaks of another engine process."""
        if epoch != self.epoch:
            raise FailedPrecondition(
                "The engine was restarted: its epoch is another one and old handles are dead. "
                "Read the manifest again.",
                reason="EPOCH_CHANGED",
            )

    def manifest(self, rank: int = 0) -> pb.WeightManifest:
        """The weights of one worker. Raises FailedPrecondition where there is none of that rank."""
        answers = self.vllm.ask_workers("apollo_manifest")
        manifests = [pb.WeightManifest.FromString(answer) for answer in answers]
        if not 0 <= rank < len(manifests):
            raise FailedPrecondition(
                f"vLLM runs {len(manifests)} workers, and none of rank {rank}.",
                reason="TENSOR_PARALLEL_UNSUPPORTED",
            )
        manifest = manifests[rank]
        self._worker_pids = [each.worker_pid for each in manifests if each.worker_pid]
        manifest.epoch = self.epoch
        manifest.weight_version = self._version.number
        manifest.vllm_version = self.vllm.version
        manifest.as_loaded = self._version.as_loaded and manifest.generation <= FIRST
        # Others change the weights of all workers by one call.
        if manifests[0].HasField("generation_page"):
            self._generation = self._generation or SharedGeneration(manifests[0].generation_page)
        return manifest

    def trace(self, request: pb.TraceCheckpointMapRequest) -> pb.TraceCheckpointMapResponse:
        """Runs the shadow load in the workers."""
        response, refused = pb.TraceCheckpointMapResponse(epoch=request.epoch), set[str]()
        for answer in self.vllm.ask_workers("apollo_trace", request.SerializeToString()):
            found = pb.TraceCheckpointMapResponse.FromString(answer)
            response.views.extend(found.views)
            response.refused.extend(each for each in found.refused if each.name not in refused)
            refused |= {each.name for each in found.refused}
        return response

    def score(self, token_ids: list[int]) -> list[float]:
        """vLLM's log-probability of each token after the first, in nats.

        Raises as `require_running`.
        """
        self.require_running()
        return self.vllm.wait_for(self.requests.score(token_ids))

    def require_running(self) -> None:
        """Raises Unavailable while vLLM is paused: a request would wait for the resume."""
        if self.paused:
            raise Unavailable("The engine is paused; ask after the resume.", reason="PAUSED")
        self.vllm.wait_for(self._others.look())
        if self._others.wanted:
            raise Unavailable(
                f"vLLM is paused by {WHO} and computes nothing until they let it go on "
                "(POST /resume or /wake_up).",
                reason="PAUSED_BY_OTHERS",
            )

    def probe(self, request: pb.ProbeWeightsRequest, seconds: float) -> pb.ProbeWeightsResponse:
        """Changes bytes for a moment and scores with them, under a lease that it begins or renews.

        Raises as `PauseLeases.acquire`, and FailedPrecondition where the worker refuses.
        """
        self.leases.acquire(request.lease_id, seconds, PROBE)

        def ask() -> bytes:
            self._probed, payload = True, request.SerializeToString()
            # All of them first: in a pass, the others would wait for one that had refused.
            self.vllm.ask_workers("apollo_change", payload)
            return self.vllm.ask_workers("apollo_probe", payload)[0]

        # Bytes that are changed after the lease has ended would be put back by nobody.
        return pb.ProbeWeightsResponse.FromString(self.leases.during(request.lease_id, ask))

    def _put_back(self) -> None:
        """Undoes a probe. Raises where that fails: the engine must not go on with its bytes."""
        for attempt in range(1, PUT_BACK_ATTEMPTS + 1):
            if not self._probed:
                return
            try:
                self.vllm.ask_workers("apollo_put_back")
                self._probed = False
            except ApolloError as error:
                log.error("apollo: vLLM stays paused. %s", error.message)
                if attempt == PUT_BACK_ATTEMPTS:
                    raise

    def _pause(self, mode: str) -> None:
        if mode != PROBE:
            # Its holder may write from now on, and die without a word of what it wrote.
            self._version.as_loaded = False
        if mode == NO_PAUSE:
            # One that an earlier lease could not resume would wait for the end of this one.
            self._go_on()
            self.vllm.ask_workers("apollo_hold")
            return
        if not self.paused:
            self.vllm.wait_for(self._others.look())
        self.paused, self._resumes = True, self._others.resumes
        # `keep` leaves the cache alone whatever clear_cache says in some versions; the reset at
        # the resume is what clears it, and its answer is checked.
        kept = "keep" if mode == PROBE else mode
        self.vllm.wait_for(self._others.pause(mode=kept, clear_cache=False))
        # Otherwise the step in flight would read weights that are being written (vLLM 0.26).
        if HELD in self.vllm.ask_workers("apollo_hold"):
            # The pause that was found is of a lease whose API server ended.
            self._others.wanted = False
        if mode == PROBE:
            # A probe computes in blocks that must be nobody's.
            self.reset_caches()

    def _require_kept(self) -> None:
        """Raises FailedPrecondition where somebody else made vLLM go on in mid-lease."""
        if not self.paused:
            return
        try:
            kept = self.vllm.ping(self._others.look())
        except Unavailable as error:
            # A wedged engine computes nothing either; watchers hear of it.
            log.debug("apollo: the paused engine does not answer: %s", error)
            kept = True
        if not kept or self._resumes != self._others.resumes:
            raise FailedPrecondition(
                "Somebody else let vLLM go on (POST /resume or /wake_up) while it was paused for "
                "training.",
                reason="LEASE_ENDED",
            )

    def _resume(self, updates: int, reset_caches: bool) -> None:
        self._put_back()
        try:
            self._version.tell(updates, reset_caches)
        finally:
            try:
                self.vllm.ask_workers("apollo_let_go")
            finally:
                self._go_on()

    def _go_on(self) -> None:
        if self.paused:
            self._put_back()
            if self._others.wanted:
                log.info("apollo: vLLM stays paused, as %s left it", WHO)
            else:
                self.vllm.wait_for(self._others.resume())
            self.paused = False

    @property
    def weight_version(self) -> int:
        """How many updates were written to the weights since this engine started.

        Those of a training server that died in a pause count as one.
        """
        return self._version.number

    def raise_version(self, updates: int) -> None:
        """Counts updates of the weights, as `WeightVersion.raise_by`."""
        self._version.raise_by(updates)

    def reset_caches(self) -> None:
        """Drops cached prefixes, as `WeightVersion.reset_caches`."""
        self._version.reset_caches()

    def _trainer_left(self) -> None:
        """Its runs will drop no caches any more: what they kept is of older weights."""
        if self._version.is_cache_stale():
            self.leases.finish_soon()

    def generations(self) -> Iterator[Generation | None]:
        """The generation now, at each change and at each beat; None for a beat without an answer.

        Ends when the engine or vLLM's event loop does.
        """
        _, count = self._token_times.since(0)
        while self.vllm.alive:
            told = self._version.number
            if self._responds():
                generation = self._generation.now if self._generation else 0
                new, count = self._token_times.since(count)
                yield Generation(self.epoch, generation, told, self._others.wanted, new)
            else:
                yield None
            self._version.wait_for_another(told, BEAT_SECONDS)

    def _responds(self) -> bool:
        """Whether the engine is known to answer; one that decodes is not asked, only watched."""
        if not all(map(process_state.runs_with_parent, self._worker_pids)):
            return False
        if not (self.paused or self._others.wanted):
            return True
        try:
            # A probe, or the step that a pause waits for, may take seconds: nothing answers then.
            if not self.vllm.at_work:
                self.vllm.ping(self._others.look())
        except Exception as error:
            log.debug("apollo: the paused engine does not answer: %s", error)
            return self.vllm.at_work
        return True

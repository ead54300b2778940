"""An engine without vLLM: a small transformers model in shared memory behind the real sidecar.

The sidecar's service, leases, memory, manifest and shadow load are the product's own. What stands
in for vLLM is its client (`ClientDouble`) and the scoring of a prompt.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from apollo_grpc.interceptors import SyncErrors
from apollo_grpc.transport import SERVER_OPTIONS, open_port
from apollo_grpc.v1 import weight_export_pb2 as pb
from apollo_grpc.v1.weight_export_pb2_grpc import add_WeightExportServiceServicer_to_server
from apollo_sidecar.changed_bytes import ChangedBytes
from apollo_sidecar.engine import Engine
from apollo_sidecar.memfd_weights import MemfdWeights
from apollo_sidecar.sample_tokens import SampleTokens
from apollo_sidecar.service import WeightExportService
from apollo_sidecar.shadow_load import trace_checkpoint_map
from tests.plain_prompts import PlainPrompts
from tests.waiting import HANG

MAX_MODEL_LEN = 48


class ServedModel(torch.nn.Module):
    """A model of a directory, loaded by name as vLLM loads; its weights live in a memfd."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        self.folder = folder
        self.module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.live = MemfdWeights(self.module)
        self._copies: dict[str, torch.Tensor] = {}

    def keep_copies(self, patterns: Iterable[str]) -> None:
        """Copies the weights of these names, `*` for any part; computes with that from then on."""
        names = dict(self.module.named_parameters(remove_duplicate=False))
        for pattern in patterns:
            found = fnmatch.filter(names, pattern)
            assert found, f"no weight is named {pattern}"
            self._copies |= {name: names[name].detach().clone() for name in found}

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """vLLM's own entry point, which the shadow load traces."""
        parameters = dict(self.module.named_parameters())
        for name, tensor in tensors:
            parameters[name].data.copy_(tensor)

    def modules(self) -> Iterator[torch.nn.Module]:
        """Of vLLM's model: the trace puts back what a loader registers anew in them."""
        return self.module.modules()

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of the live weights by name."""
        return {n: p.detach().clone() for n, p in self.module.named_parameters()}

    @torch.no_grad()
    def score(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token after the first."""
        ids = torch.tensor([token_ids])
        answer: Any = functional_call(self.module, self._copies, (ids,), {"use_cache": False})
        logprobs = answer.logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()


class ClientDouble:
    """The calls of vLLM's AsyncLLM that the sidecar uses.

    Attributes:
        calls: in their order, but for those of a probe.
        changed: what a probe has changed.
        on_probe: told the number of a probe's call, after its change and before its scores.
        before: called by a method's name, or a worker's, when it is; what it raises, that does.
    """

    errored = False

    def __init__(self, model: ServedModel):
        self._model = model
        self.calls: list[str] = []
        self.answers_pings = True
        self.changed = ChangedBytes()
        self.on_probe: Callable[[int], None] = lambda number: None
        self.before: dict[str, Callable[[], Any]] = {}
        self._probes = self._paused_at = 0
        self._paused = False

    async def is_paused(self) -> bool:
        while not self.answers_pings:
            await asyncio.sleep(0.01)
        return self._paused

    async def collective_rpc(self, method: str, args: tuple[bytes, ...] = ()) -> list[Any]:
        self._begin(method)
        if method == "apollo_manifest":
            answer: Any = self._model.live.manifest()
            answer.model, answer.max_model_len = str(self._model.folder), MAX_MODEL_LEN
        elif method in ("apollo_hold", "apollo_let_go"):
            return [("", "", b"")]
        elif method == "apollo_put_back":
            self.changed.put_back()
            return [("", "", b"")]
        elif method == "apollo_probe":
            answer = self._probe(pb.ProbeWeightsRequest.FromString(args[0]))
        else:
            request = pb.TraceCheckpointMapRequest.FromString(args[0])
            answer = trace_checkpoint_map(self._model, self._model.live, request)
        return [("", "", answer.SerializeToString())]

    def _begin(self, method: str) -> None:
        self.before.get(method, lambda: None)()

    def _probe(self, request: pb.ProbeWeightsRequest) -> pb.ProbeWeightsResponse:
        self._probes += 1
        self.changed.change(self._model.live, request.changes)
        self.on_probe(self._probes)
        return pb.ProbeWeightsResponse(logprobs=self._model.score(list(request.token_ids)))

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self._paused, self._paused_at = True, len(self.calls)
        self.calls.append(f"pause {mode}")

    async def resume_generation(self) -> None:
        self._begin("resume_generation")
        self._paused = False
        self.calls.append("resume")
        if self._probes:
            # Every attachment begins with one; a test is about what follows.
            del self.calls[self._paused_at :]
            self._probes = 0

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        self._begin("reset_prefix_cache")
        self.calls.append("reset caches")
        return True


class _ScoringEngine(Engine):
    def __init__(self, client: ClientDouble, loop: Any, model: ServedModel, wrong_by: float):
        super().__init__(client, loop)
        self._model, self._wrong_by = model, wrong_by

    async def _score(self, token_ids: list[int]) -> list[float]:
        return [logprob + self._wrong_by for logprob in self._model.score(token_ids)]


class EngineDouble:
    """One engine process's worth of sidecar, on a unix socket, until `stop`.

    Args:
        folder: model directory to serve.
        address: of the sidecar.
        scores_wrong_by: added to every log-probability, as if other weights were computed with.
        keeps_copies: names of weights that are copied at load, as of `ServedModel.keep_copies`.
    """

    def __init__(
        self,
        folder: Path,
        address: str,
        *,
        dtype: torch.dtype = torch.float32,
        scores_wrong_by: float = 0.0,
        keeps_copies: Iterable[str] = (),
    ):
        self.model = ServedModel(folder, dtype)
        self.model.keep_copies(keeps_copies)
        self.client = ClientDouble(self.model)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.engine = _ScoringEngine(self.client, self._loop, self.model, scores_wrong_by)
        self.tokens = SampleTokens(PlainPrompts(folder), self._loop)
        self._address = address
        self._serve()

    def _serve(self) -> None:
        pool = futures.ThreadPoolExecutor(16)
        self._server = grpc.server(pool, interceptors=[SyncErrors()], options=SERVER_OPTIONS)
        service = WeightExportService(self.engine, self.tokens)
        add_WeightExportServiceServicer_to_server(service, self._server)
        self._lock = open_port(self._server, self._address)
        self._server.start()

    @property
    def calls(self) -> list[str]:
        """What vLLM was asked to do, in order."""
        return self.client.calls

    def _close(self) -> None:
        self._server.stop(grace=None).wait()
        if self._lock:
            self._lock.release()

    def call(self, coroutine: Any) -> Any:
        """What somebody else asks of vLLM, by its own routes."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(HANG)

    def drop_connections(self) -> None:
        """Ends every call, and serves the same engine again."""
        self._close()
        self._serve()

    def stop(self) -> None:
        """The engine is gone, as when its process was killed. Idempotent."""
        if not self._loop.is_running():
            return
        self._close()
        if self.engine.leases._timer:
            self.engine.leases._timer.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        # Its memory goes with the process: whoever has not mapped it yet is too late.
        os.close(self.model.live._fd)

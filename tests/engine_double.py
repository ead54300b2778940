"""An engine without vLLM: a small transformers model in shared memory behind the real sidecar.

The sidecar's service, leases, memory, manifest and shadow load are the product's own. What stands
in for vLLM is its client (`ClientDouble`), and what scores and answers prompts (`RequestsDouble`).
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from apollo_grpc.interceptors import SyncErrors
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_grpc.sidecar.v1.weight_export_pb2_grpc import add_WeightExportServiceServicer_to_server
from apollo_grpc.transport import SERVER_OPTIONS, open_port
from apollo_sidecar.answers import Answers
from apollo_sidecar.changed_bytes import ChangedBytes
from apollo_sidecar.engine import Engine
from apollo_sidecar.memfd_weights import MemfdWeights
from apollo_sidecar.own_batch import SCORE_PREFIX
from apollo_sidecar.own_requests import OwnRequests
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
    def _logits(self, token_ids: list[int]) -> torch.Tensor:
        ids = (torch.tensor([token_ids]),)
        answer: Any = functional_call(self.module, self._copies, ids, {"use_cache": False})
        return answer.logits[0].float()

    def score(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token after the first."""
        logprobs = self._logits(token_ids)[:-1].log_softmax(-1)
        return logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()

    def answer(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """The likeliest tokens after a prompt, up to one that ends an answer, with it."""
        listed = self.module.generation_config.eos_token_id
        ends = {listed} if isinstance(listed, int) else set(listed or ())
        said: list[int] = []
        while len(said) < max_tokens and ends.isdisjoint(said):
            said.append(int(self._logits([*token_ids, *said])[-1].argmax()))
        return said


class ClientDouble:
    """The calls of vLLM's AsyncLLM that the sidecar uses.

    Attributes:
        calls: in their order, but for those of a probe.
        changed: what a probe has changed.
        on_probe: told the number of a probe's call, after its change and before its scores.
        before: called by a method's name, or a worker's, when it is; what it raises, that does.
            By "answer" before each prompt that is answered.
    """

    errored = False

    def __init__(self, model: ServedModel):
        self._model = model
        self.calls: list[str] = []
        self.answers_pings = True
        self.changed = ChangedBytes()
        self.on_probe: Callable[[int], None] = lambda number: None
        self.before: dict[str, Callable[[], Any]] = {}
        self._probes = self._paused_at = self._at_work = 0
        self._paused = False
        vocabulary = model.module.config.vocab_size
        self.model_config = SimpleNamespace(
            max_model_len=MAX_MODEL_LEN, get_vocab_size=lambda: vocabulary
        )

    async def is_paused(self) -> bool:
        while self._at_work or not self.answers_pings:
            await asyncio.sleep(0.01)
        return self._paused

    async def collective_rpc(self, method: str, args: tuple[bytes, ...] = ()) -> list[Any]:
        # vLLM's engine core answers one call after the other, and its client all at once.
        self._at_work += 1
        try:
            return await asyncio.to_thread(self._worker_answer, method, args)
        finally:
            self._at_work -= 1

    def _worker_answer(self, method: str, args: tuple[bytes, ...]) -> list[Any]:
        self.begin(method)
        if method == "apollo_manifest":
            answer: Any = self._model.live.manifest()
            answer.model, answer.max_model_len = str(self._model.folder), MAX_MODEL_LEN
        elif method in ("apollo_hold", "apollo_let_go"):
            return [("", "", b"")]
        elif method == "apollo_put_back":
            self.changed.put_back()
            return [("", "", b"")]
        elif method == "apollo_change":
            request = pb.ProbeWeightsRequest.FromString(args[0])
            self.changed.change(self._model.live, request.changes)
            return [("", "", b"")]
        elif method == "apollo_probe":
            answer = self._probe(pb.ProbeWeightsRequest.FromString(args[0]))
        else:
            traced = pb.TraceCheckpointMapRequest.FromString(args[0])
            answer = trace_checkpoint_map(self._model, self._model.live, traced)
        return [("", "", answer.SerializeToString())]

    def begin(self, method: str) -> None:
        """Calls what a test has for it."""
        self.before.get(method, lambda: None)()

    def _probe(self, request: pb.ProbeWeightsRequest) -> pb.ProbeWeightsResponse:
        self._probes += 1
        self.on_probe(self._probes)
        return pb.ProbeWeightsResponse(logprobs=self._model.score(list(request.token_ids)))

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self._paused, self._paused_at = True, len(self.calls)
        self.calls.append(f"pause {mode}")

    async def resume_generation(self) -> None:
        self.begin("resume_generation")
        self._paused = False
        self.calls.append("resume")
        if self._probes:
            # Every attachment begins with one; a test is about what follows.
            del self.calls[self._paused_at :]
            self._probes = 0

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        self.begin("reset_prefix_cache")
        self.calls.append("reset caches")
        return True


class RequestsDouble(OwnRequests):
    """The model's own scores and answers, with its live weights."""

    def __init__(self, client: ClientDouble, model: ServedModel, wrong_by: float):
        super().__init__(client)
        self._model, self._wrong_by = model, wrong_by

    async def score(self, token_ids: list[int], prefix: str = SCORE_PREFIX) -> list[float]:
        return [logprob + self._wrong_by for logprob in self._model.score(token_ids)]

    async def answer(self, token_ids: list[int], max_tokens: int) -> list[int]:
        self.client.begin("answer")
        return self._model.answer(token_ids, max_tokens)


class PromptsDouble(PlainPrompts):
    """Of the served folder's tokenizer; where there is none, texts are the ids themselves."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        # Transformers makes an empty tokenizer of a model's type where there is none.
        self._is_there = (folder / "tokenizer_config.json").exists()

    async def text_of(self, ids: Sequence[int], *, special: bool) -> str:
        if not self._is_there:
            return " ".join(str(token) for token in ids)
        return await super().text_of(ids, special=special)


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
        self.engine = Engine(self.client, self._loop)
        self.engine.requests = RequestsDouble(self.client, self.model, scores_wrong_by)
        prompts = PromptsDouble(folder)
        self.tokens = SampleTokens(prompts, self._loop)
        self._answers = Answers(self.engine, prompts)
        self._address = address
        self._serve()

    def _serve(self) -> None:
        pool = futures.ThreadPoolExecutor(16)
        self._server = grpc.server(pool, interceptors=[SyncErrors()], options=SERVER_OPTIONS)
        service = WeightExportService(self.engine, self.tokens, self._answers)
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

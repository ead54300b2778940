"""What the plugin adds to vLLM's workers: live weights at load, and calls to ask about them.

Messages cross vLLM's process boundary as serialized protobuf, which every serializer of
`collective_rpc` carries as plain bytes.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any

import torch

from apollo_grpc.errors import ApolloError, FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.changed_bytes import ChangedBytes
from apollo_sidecar.cpu_live import keep_cpu_weights_live
from apollo_sidecar.cuda_weights import CudaWeights
from apollo_sidecar.live_weights import LiveWeights
from apollo_sidecar.memfd_weights import MemfdWeights
from apollo_sidecar.model_directory import model_directory
from apollo_sidecar.other_writers import EXPORT, guard, hold
from apollo_sidecar.own_batch import OwnBatch, own_batch
from apollo_sidecar.refusals import (
    device_of,
    require_live_experts,
    require_live_latents,
    require_shareable,
)
from apollo_sidecar.shadow_load import trace_checkpoint_map

log = logging.getLogger("vllm.apollo")
_REFUSAL = "_apollo_refusal"
_CHANGED = "_apollo_changed_bytes"
_BATCH = "_apollo_own_batch"
_DIRECTORY = "_apollo_directory"
_ENGINE_ID = uuid.uuid4().hex


def install(worker_base: Any) -> None:
    """Wraps model loading and adds the calls. Idempotent.

    Args:
        worker_base: the module vllm.v1.worker.worker_base. Its WorkerWrapperBase has no
            `load_model` of its own and forwards to the worker's, so defining one is the hook that
            runs before profiling, compilation and graph capture.
    """
    worker_base.WorkerWrapperBase.load_model = _load_model
    worker_base.WorkerBase.apollo_engine_id = _engine_id
    worker_base.WorkerBase.apollo_manifest = _manifest
    worker_base.WorkerBase.apollo_trace = _trace
    worker_base.WorkerBase.apollo_hold = _hold
    worker_base.WorkerBase.apollo_let_go = _let_go
    worker_base.WorkerBase.apollo_change = _change
    worker_base.WorkerBase.apollo_probe = _probe
    worker_base.WorkerBase.apollo_put_back = _put_back
    guard(worker_base.WorkerWrapperBase)
    execute = worker_base.WorkerWrapperBase.execute_model
    if not hasattr(execute, _BATCH):
        worker_base.WorkerWrapperBase.execute_model = _remembering(execute)


def _remembering(execute: Any) -> Any:
    """vLLM's own `execute_model`, which keeps what it is given for a prompt of ours."""

    def execute_model(wrapper: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if batch := own_batch(scheduler_output):
                setattr(wrapper.worker, _BATCH, batch)
        except Exception:
            # Without it a probe is refused, and vLLM goes on.
            log.exception("apollo: a prompt was not kept")
        return execute(wrapper, scheduler_output, *args, **kwargs)

    setattr(execute_model, _BATCH, True)
    return execute_model


def _load_model(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Loads as vLLM does; on CPU the weights are moved to shared memory then.

    A failure of ours is logged and leaves vLLM serving; the training server is told why it
    cannot attach.
    """
    worker = wrapper.worker
    try:
        require_shareable(worker.vllm_config)
        keep_cpu_weights_live()
    except Exception as error:
        _refuse(worker, error)
    result = worker.load_model(*args, **kwargs)
    setattr(worker, _DIRECTORY, model_directory(worker.vllm_config))
    if getattr(worker, _REFUSAL, None) is None:
        try:
            _prepare(worker)
        except Exception as error:
            _refuse(worker, error)
    return result


def _prepare(worker: Any) -> None:
    model = worker.model_runner.get_model()
    require_live_experts(model)
    # Weights on a GPU stay where they are, and are exported once somebody asks for them.
    if device_of(model) == "cpu":
        _share(worker, MemfdWeights(model))
    require_live_latents(model, worker.vllm_config)


def _share(worker: Any, live: LiveWeights) -> LiveWeights:
    setattr(worker, EXPORT, live)
    log.info("apollo: %d tensors, %d bytes, are shared", len(live.tensors), live.size_bytes)
    return live


def _refuse(worker: Any, error: Exception) -> None:
    log.error("apollo: the weights are not shared; vLLM goes on serving", exc_info=error)
    why, reason = type(error).__name__, "WEIGHTS_NOT_SHARED"
    if isinstance(error, ApolloError):
        why, reason = error.message, error.reason
    elif isinstance(error, OSError):
        why = f"the system refused ({error})"
    setattr(worker, _REFUSAL, (why, reason))


def _live_weights(worker: Any) -> LiveWeights:
    why, reason = getattr(worker, _REFUSAL, None) or ("", "")
    model_runner = worker.model_runner
    if model_runner is None:
        why, reason = "this worker loaded no model", "WEIGHTS_NOT_SHARED"
    if why:
        raise FailedPrecondition(
            f"vLLM does not share its weights: {why}. Its log says more.", reason=reason
        )
    model = model_runner.get_model()
    live: LiveWeights = getattr(worker, EXPORT, None) or _share(worker, CudaWeights(model))
    live.require_unmoved(model)
    return live


def _engine_id(worker: Any) -> str:
    """Random for each worker process: what the API servers of one engine have in common."""
    return _ENGINE_ID


def _answer(error: ApolloError | None, payload: bytes = b"") -> tuple[str, str, bytes]:
    # An exception would cross vLLM's process boundary as text, without its reason.
    return (error.reason, error.message, b"") if error else ("", "", payload)


def _manifest(worker: Any) -> tuple[str, str, bytes]:
    try:
        manifest = _live_weights(worker).manifest()
    except ApolloError as error:
        return _answer(error)
    manifest.model = getattr(worker, _DIRECTORY)
    manifest.max_model_len = worker.vllm_config.model_config.max_model_len
    manifest.tensor_parallel_rank = worker.rank
    manifest.tensor_parallel_size = worker.vllm_config.parallel_config.tensor_parallel_size
    return _answer(None, manifest.SerializeToString())


def _trace(worker: Any, request: bytes) -> tuple[str, str, bytes]:
    try:
        live = _live_weights(worker)
    except ApolloError as error:
        return _answer(error)
    parsed = pb.TraceCheckpointMapRequest.FromString(request)
    response = trace_checkpoint_map(worker.model_runner.get_model(), live, parsed)
    for view in response.views:
        view.rank = worker.rank
    return _answer(None, response.SerializeToString())


def _hold(worker: Any) -> tuple[str, str, bytes]:
    """A lease to write has begun."""
    before = hold(worker, True)
    _synchronize(worker)
    return _answer(None, before)


def _let_go(worker: Any) -> tuple[str, str, bytes]:
    """It has ended."""
    hold(worker, False)
    return _answer(None)


def _synchronize(worker: Any) -> tuple[str, str, bytes]:
    """Waits for what the GPU still computes: a pause ends before that in some versions."""
    if worker.device is not None and worker.device.type == "cuda":
        torch.cuda.synchronize(worker.device)
    return _answer(None)


def _changed_bytes(worker: Any) -> ChangedBytes:
    changed: ChangedBytes | None = getattr(worker, _CHANGED, None)
    if changed is None:
        changed = ChangedBytes()
        setattr(worker, _CHANGED, changed)
    return changed


def _change(worker: Any, request: bytes) -> tuple[str, str, bytes]:
    """Changes the bytes of this worker that a probe names; what was changed stays so."""
    asked = pb.ProbeWeightsRequest.FromString(request)
    batch: OwnBatch | None = getattr(worker, _BATCH, None)
    if batch is None or batch.token_ids != list(asked.token_ids):
        why = "Another prompt than the probe's was scored last. Score it, then probe again."
        return _answer(FailedPrecondition(why, reason="SCORE_FIRST"))
    own = [change for change in asked.changes if change.rank == worker.rank]
    try:
        _changed_bytes(worker).change(_live_weights(worker), own)
    except ApolloError as error:
        return _answer(error)
    return _synchronize(worker)


def _probe(worker: Any, request: bytes) -> tuple[str, str, bytes]:
    """Scores the prompt that was scored last, with the weights as they are."""
    try:
        scores = getattr(worker, _BATCH).run(worker)
    except ApolloError as error:
        return _answer(error)
    except Exception as error:
        log.exception("apollo: a probe failed")
        why = f"vLLM failed to score the probe ({type(error).__name__}); its log says more."
        return _answer(FailedPrecondition(why, reason="PROBE_FAILED"))
    return _answer(None, pb.ProbeWeightsResponse(logprobs=scores).SerializeToString())


def _put_back(worker: Any) -> tuple[str, str, bytes]:
    """Undoes what a probe changed; nothing where there was none."""
    try:
        _changed_bytes(worker).put_back()
    except ApolloError as error:
        return _answer(error)
    return _synchronize(worker)

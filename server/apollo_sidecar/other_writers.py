"""Who else changes vLLM's weights: counted, and refused while a training server writes.

vLLM reaches a worker's methods by name, through `WorkerWrapperBase.__getattr__`, whoever asks: its
HTTP routes for development and reinforcement learning, its weight transfer, and
`collective_rpc` from a user's own code. What only a user's own worker extension knows is not seen
here; the training server compares what it left before it writes again.

Read in vLLM 0.26 and 0.32: v1/worker/{worker_base,gpu_worker,cpu_worker}.py, v1/serial_utils.py,
v1/executor/abstract.py. What a release does not have is never asked for.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from apollo_sidecar.live_weights import LiveWeights

log = logging.getLogger("vllm.apollo")
CHANGES_WEIGHTS = frozenset(
    {
        "reload_weights",
        "reset_weights",
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
        "finish_weight_update",
        "sleep",
        "wake_up",
        "discard",
        "checkpoint_restore",
        "elastic_ep_execute",
        "apply_model",
    }
)
EXPORT = "_apollo_live_weights"
HELD = b"held"
_IS_HELD = "_apollo_held"
_GUARDED = "_apollo_guarded"


class WeightsHeld(RuntimeError):
    """What vLLM passes on to whoever asked."""


def hold(worker: Any, held: bool) -> bytes:
    """From now on nobody else may change this worker's weights, or may again.

    Returns HELD where nobody might before, as after an API server that ended in a lease.
    """
    before = getattr(worker, _IS_HELD, False)
    setattr(worker, _IS_HELD, held)
    return HELD if before else b""


def guard(wrapper_class: Any) -> None:
    """Wraps how a worker's methods are looked up. Idempotent.

    Args:
        wrapper_class: vllm.v1.worker.worker_base.WorkerWrapperBase.
    """
    look_up = wrapper_class.__getattr__
    if hasattr(look_up, _GUARDED):
        return

    def guarded(wrapper: Any, name: str) -> Any:
        found = look_up(wrapper, name)
        return _guarded(wrapper.worker, found) if name in CHANGES_WEIGHTS else found

    setattr(guarded, _GUARDED, True)
    wrapper_class.__getattr__ = guarded


def _guarded(worker: Any, method: Any) -> Any:
    @functools.wraps(method)
    def change(*args: Any, **kwargs: Any) -> Any:
        name = method.__name__
        if getattr(worker, _IS_HELD, False):
            raise WeightsHeld(
                f"apollo: {name} is refused while a training run writes to vLLM's weights; nothing "
                "was changed. Wait for the run, or end it with 'apollo cancel', then ask again."
            )
        live: LiveWeights | None = getattr(worker, EXPORT, None)
        if live is not None:
            live.generation.advance()
            log.warning("apollo: %s: the weights may be others now; no run goes on with them", name)
        return method(*args, **kwargs)

    return change

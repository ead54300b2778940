"""The batch that vLLM made of a prompt that we had scored, run again while vLLM is paused.

A paused scheduler runs nobody's request, ours neither, and an engine that goes on would answer
others with weights that a probe has changed. So the worker keeps what the scheduler sent it for our
own prompt, and runs that alone. The blocks it was given are nobody's once all caches were reset
under the pause.

Read in vLLM 0.26, 0.32 and 0.33, below v1: core/sched/output.py, worker/gpu_model_runner.py
(execute_model, _update_states), core/sched/scheduler.py (reset_prefix_cache).
"""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass, fields, replace
from typing import Any

from apollo_grpc.errors import FailedPrecondition

SCORE_PREFIX = "apollo-score-"
_CONNECTORS = ("kv_connector_metadata", "ec_connector_metadata", "aux_output_connector_metadata")


@dataclass(frozen=True)
class OwnBatch:
    """One prompt of ours, whole, as the scheduler sent it.

    Attributes:
        scheduled: vLLM's SchedulerOutput with all else taken out.
    """

    token_ids: list[int]
    scheduled: Any

    def run(self, worker: Any) -> list[float]:
        """The log-probability of each token after the first, with the weights as they are.

        vLLM must be paused, with its caches reset. Afterwards the worker has forgotten the request.

        Raises FailedPrecondition where the caches leave the engine.
        """
        if any(getattr(self.scheduled, name, None) is not None for name in _CONNECTORS):
            raise FailedPrecondition(
                "vLLM's caches go to a connector (--kv-transfer-config), which a probe would feed "
                "with changed weights. Start vLLM without it, or the training server with "
                "--no-probe-weights.",
                reason="PROBE_IMPOSSIBLE",
            )
        (request,) = self.scheduled.scheduled_new_reqs
        name = f"apollo-probe-{uuid.uuid4().hex}"
        again = replace(copy.deepcopy(request), req_id=name)
        count = {name: self.scheduled.total_num_scheduled_tokens}
        try:
            output = worker.execute_model(
                replace(self.scheduled, scheduled_new_reqs=[again], num_scheduled_tokens=count)
            )
            if output is None:
                output = worker.sample_tokens(None)
            # Where scheduling is asynchronous, so is the output.
            output = output.get_output() if hasattr(output, "get_output") else output
            return [float(row[0]) for row in output.prompt_logprobs_dict[name].logprobs.tolist()]
        finally:
            forget: dict[str, Any] = {"scheduled_new_reqs": [], "num_scheduled_tokens": {}}
            forget |= {"total_num_scheduled_tokens": 0, "finished_req_ids": {name}}
            worker.execute_model(replace(self.scheduled, **forget))


def own_batch(scheduled: Any) -> OwnBatch | None:
    """Our prompt in a step's SchedulerOutput; None where there is none, or not as a whole."""
    for request in scheduled.scheduled_new_reqs:
        if request.req_id.startswith(SCORE_PREFIX):
            tokens = list(request.prompt_token_ids)
            if scheduled.num_scheduled_tokens[request.req_id] == len(tokens):
                return OwnBatch(tokens, _alone(scheduled, copy.deepcopy(request), len(tokens)))
    return None


def _alone(scheduled: Any, request: Any, tokens: int) -> Any:
    there = {field.name for field in fields(scheduled)}
    preempted = getattr(scheduled, "preempted_req_ids", None)
    alone = {
        "scheduled_new_reqs": [request],
        "scheduled_cached_reqs": type(scheduled.scheduled_cached_reqs).make_empty(),
        "num_scheduled_tokens": {request.req_id: tokens},
        "total_num_scheduled_tokens": tokens,
        "scheduled_spec_decode_tokens": {},
        "scheduled_encoder_inputs": {},
        "finished_req_ids": set(),
        "free_encoder_mm_hashes": [],
        "preempted_req_ids": None if preempted is None else set(),
        "has_structured_output_requests": False,
        "pending_structured_output_tokens": False,
        "num_invalid_spec_tokens": None,
        # Of vLLM 0.26: blocks that all running requests begin with, for each group.
        "num_common_prefix_blocks": [0] * len(getattr(scheduled, "num_common_prefix_blocks", ())),
    }
    return replace(scheduled, **{name: value for name, value in alone.items() if name in there})

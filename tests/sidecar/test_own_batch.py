"""Our prompt is taken out of vLLM's batch, and run alone while vLLM is paused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from apollo_grpc.errors import FailedPrecondition
from apollo_sidecar.own_batch import SCORE_PREFIX, own_batch

output = pytest.importorskip("vllm.v1.core.sched.output")


def request(name, tokens):
    return output.NewRequestData(
        req_id=name,
        prompt_token_ids=tokens,
        mm_features=[],
        sampling_params=None,
        pooling_params=None,
        block_ids=([3, 4],),
        num_computed_tokens=0,
        lora_request=None,
    )


def scheduled(*requests, short=0, **more):
    counts = {r.req_id: len(r.prompt_token_ids) - short for r in requests}
    fields = {
        "scheduled_new_reqs": list(requests),
        "scheduled_cached_reqs": output.CachedRequestData.make_empty(),
        "num_scheduled_tokens": counts,
        "total_num_scheduled_tokens": sum(counts.values()),
        "scheduled_spec_decode_tokens": {},
        "scheduled_encoder_inputs": {},
        "finished_req_ids": {"gone"},
        "free_encoder_mm_hashes": [],
    }
    return output.SchedulerOutput(**fields | more)


OTHER = request("chatcmpl-1", [9] * 7)
OURS = request(f"{SCORE_PREFIX}ab", [5, 6, 7])


class Worker:
    """Computes as vLLM's workers do: at once, or in two parts, or with an output to wait for."""

    def __init__(self, way):
        self.way, self.steps = way, []

    def execute_model(self, given):
        self.steps.append(given)
        if self.way == "fails" and given.scheduled_new_reqs:
            raise RuntimeError("no memory")
        return self._output(given) if self.way == "at once" else None

    def sample_tokens(self, grammar):
        found = self._output(self.steps[-1])
        return found if self.way == "in two" else SimpleNamespace(get_output=lambda: found)

    def _output(self, given):
        scores = SimpleNamespace(logprobs=torch.tensor([[-1.0], [-2.0]]))
        return SimpleNamespace(
            prompt_logprobs_dict={r.req_id: scores for r in given.scheduled_new_reqs}
        )


@pytest.mark.parametrize("way", ["at once", "in two", "later"])
def test_our_prompt_alone_is_run_and_forgotten(way):
    worker, batch = Worker(way), own_batch(scheduled(OTHER, OURS))
    assert batch.token_ids == [5, 6, 7]
    assert batch.run(worker) == batch.run(worker) == [-1.0, -2.0]
    run, forget, again, _ = worker.steps
    (alone,) = run.scheduled_new_reqs
    assert (alone.prompt_token_ids, alone.block_ids) == ([5, 6, 7], ([3, 4],))
    assert run.num_scheduled_tokens == {alone.req_id: 3}
    assert run.total_num_scheduled_tokens == 3
    assert run.finished_req_ids == set(), "those that ended then have been forgotten long since"
    assert forget.finished_req_ids == {alone.req_id}
    assert forget.total_num_scheduled_tokens == 0
    assert again.scheduled_new_reqs[0].req_id != alone.req_id


def test_a_run_that_fails_is_forgotten_as_well():
    worker = Worker("fails")
    with pytest.raises(RuntimeError):
        own_batch(scheduled(OURS)).run(worker)
    run, forget = worker.steps
    assert forget.finished_req_ids == {run.scheduled_new_reqs[0].req_id}


@pytest.mark.parametrize("step", [scheduled(OTHER), scheduled(OURS, short=1), scheduled()])
def test_a_step_without_the_whole_of_our_prompt_is_not_kept(step):
    assert own_batch(step) is None


def test_what_vllm_does_with_its_own_batch_afterwards_is_not_ours():
    step = scheduled(request(f"{SCORE_PREFIX}ab", [5, 6, 7]))
    batch = own_batch(step)
    step.scheduled_new_reqs[0].block_ids[0].append(8)
    assert batch.scheduled.scheduled_new_reqs[0].block_ids == ([3, 4],)


def test_caches_that_leave_the_engine_are_not_fed():
    worker, batch = Worker("at once"), own_batch(scheduled(OURS, kv_connector_metadata=object()))
    with pytest.raises(FailedPrecondition, match="kv-transfer-config") as refused:
        batch.run(worker)
    assert refused.value.reason == "PROBE_IMPOSSIBLE"
    assert worker.steps == []

"""The training server with vLLM on two workers: it starts a rank beside each, and watches them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.weights.sidecar import Sidecar
from tests.vllm.conftest import Stack
from tests.waiting import alive

pytestmark = pytest.mark.vllm
IDS = [(7 * i + 3) % 259 for i in range(150)]
SAMPLES = [
    {"context_ids": [5, 17, 200, 250, 9], "continuation_ids": [258, 3, 170, 40]},
    {"context_ids": [161, 2], "continuation_ids": [99, 159, 160]},
]
STEPS = {"epochs": 5, "lr": 3e-3, "samples_per_step": 2, "min_loss": 0}
SOON = 2.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: Any) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("s"), "qwen3")
    stack._start_server()
    start_vllm(stack)
    try:
        stack.wait_attached()
        yield stack
    finally:
        stack.end("server")
        stack.end("vllm")


def start_vllm(stack: Stack) -> None:
    threads = {"VLLM_CPU_OMP_THREADS_BIND": f"{stack._cpu(0)}|{stack._cpu(1)}"}
    stack.start_vllm("--tensor-parallel-size", "2", **threads)


def follower(stack: Stack) -> int:
    """The process of the second rank."""
    assert stack.server
    pid = stack.server.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    children += [
        c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()
    ]
    (found,) = {
        int(c)
        for c in children
        if b"apollo_trainer.follow" in Path(f"/proc/{c}/cmdline").read_bytes()
    }
    return found


def train(stack: Stack, **options: Any) -> list[float]:
    """The losses of a run's steps."""
    *events, last = stack.client.train(SAMPLES, **(STEPS | options))
    assert last.finished.state == pb.RUN_STATE_SUCCEEDED, last
    return [event.step.loss for event in events if event.HasField("step")]


def test_a_run_lowers_the_loss_and_vllm_answers_with_it(stack: Stack) -> None:
    status = stack.client.status()
    assert status.weight_map.views == status.weight_map.parameters > 0
    detail = status.attachment_detail
    assert "seen to compute with what is written, in 10 kinds of weight" in detail
    before = stack.engine_logprobs(IDS)
    losses = train(stack)
    assert len(losses) == 5
    assert losses[-1] < 0.8 * losses[0]
    moved = (stack.engine_logprobs(IDS) - before).abs().max()
    assert moved > 0.1


def test_a_sync_writes_whole_tensors_that_a_model_computes_with(stack: Stack) -> None:
    stack.client.sync()
    engine = stack.engine_logprobs(IDS)
    said = stack.directory_logits(IDS)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert (said - engine).abs().max() < stack.family.tolerance_nats
    assert (
        load_file(next(stack.model.glob("*.safetensors")))["model.embed_tokens.weight"].shape[0]
        == 259
    )


def test_a_snapshot_brings_back_weights_and_moments_of_all_ranks(stack: Stack) -> None:
    client = stack.client
    client.create_snapshot("one")
    before, step = stack.engine_logprobs(IDS), client.status().optimizer_step
    losses = train(stack)
    assert not torch.equal(stack.engine_logprobs(IDS), before)
    client.restore("one")
    assert torch.equal(stack.engine_logprobs(IDS), before)
    assert client.status().optimizer_step == step
    assert train(stack) == losses


def test_a_run_that_is_not_accepted_is_taken_back_on_all_ranks(stack: Stack) -> None:
    before, step = stack.engine_logprobs(IDS), stack.client.status().optimizer_step
    tokens = pb.TokenSample(context_ids=[5, 17], continuation_ids=[77, 7, 77, 7])
    probe = pb.Probe(sample=pb.Sample(tokens=tokens), check=pb.PROBE_CHECK_EXACT)
    *_, last = stack.client.train(
        SAMPLES, **STEPS, probes=[probe], accept_if={"max_failed": 0, "max_lost": 0}
    )
    assert last.finished.state == pb.RUN_STATE_REJECTED
    assert torch.equal(stack.engine_logprobs(IDS), before)
    assert stack.client.status().optimizer_step == step


def test_updates_are_taken_back_on_all_ranks(stack: Stack) -> None:
    before, step = stack.engine_logprobs(IDS), stack.client.status().optimizer_step
    losses = train(stack)
    stack.client.undo(5)
    assert torch.equal(stack.engine_logprobs(IDS), before)
    assert stack.client.status().optimizer_step == step
    assert train(stack) == losses


def test_another_kind_of_state_comes_and_goes_on_all_ranks(stack: Stack) -> None:
    """A dry run tries one, a snapshot brings one back, and each goes on where it was."""
    client = stack.client
    client.create_snapshot("first kind")
    before, other = stack.engine_logprobs(IDS), {"rank": 8, "reset_optimizer": True}
    tried = train(stack, **other, dry_run=True)
    assert torch.equal(stack.engine_logprobs(IDS), before)
    losses = train(stack)
    client.undo(5)
    assert torch.equal(stack.engine_logprobs(IDS), before)
    taken = train(stack, **other)
    assert taken[0] == tried[0] == losses[0]
    client.create_snapshot("second kind")
    later = train(stack)
    client.restore("first kind")
    assert train(stack) == losses
    client.restore("second kind")
    assert train(stack) == later


def test_a_rank_that_is_killed_ends_the_run_and_the_engine_is_attached_again(stack: Stack) -> None:
    killed, events = 0.0, []
    for event in stack.client.train(SAMPLES, **(STEPS | {"epochs": 5000})):
        events.append(event)
        if event.HasField("step") and not killed:
            os.kill(follower(stack), signal.SIGKILL)
            killed = time.monotonic()
    assert time.monotonic() - killed < SOON
    finished = events[-1].finished
    assert (finished.state, finished.failure.reason) == (pb.RUN_STATE_FAILED, "ENGINE_LOST")
    assert "rank 1 ended (signal 9)" in finished.failure.message

    def attached() -> bool:
        return stack.client.status().attachment == status_pb2.ATTACHMENT_STATE_ATTACHED

    stack.wait_for(attached, "the attachment")
    assert len(train(stack, accept_other_weights=True)) == 5


def test_a_state_that_was_saved_is_gone_on_with_after_a_restart(stack: Stack) -> None:
    steps = stack.client.status().optimizer_step
    assert steps
    stack.end("server")
    stack._start_server()
    stack.wait_attached()
    assert stack.client.status().optimizer_step == steps
    assert len(train(stack)) == 5


def test_the_first_rank_is_killed_and_the_other_ends_with_it(stack: Stack) -> None:
    events = stack.client.train(SAMPLES, **(STEPS | {"epochs": 5000}))
    next(event for event in events if event.HasField("step"))
    other = follower(stack)
    assert stack.server
    stack.server.kill()
    stack.wait_for(lambda: not alive(other), "the other rank's end")
    stack.end("server")
    stack._start_server()
    stack.wait_attached()
    *_, last = events
    assert last.finished.state == pb.RUN_STATE_FAILED
    assert len(train(stack, accept_other_weights=True)) == 5


@pytest.mark.parametrize("worker", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_worker_of_vllm_that_is_killed_ends_the_run_with_a_reason(
    stack: Stack, worker: int
) -> None:
    detached = status_pb2.ATTACHMENT_STATE_DETACHED
    if stack.client.status().attachment == detached:
        stack.end("vllm")
        start_vllm(stack)
        stack.wait_attached()
    killed, events = 0.0, []
    options = STEPS | {"epochs": 5000, "accept_other_weights": True}
    for event in stack.client.train(SAMPLES, **options):
        events.append(event)
        if event.HasField("step") and not killed:
            os.kill(Sidecar(f"unix:{stack.state}/sidecar.sock").manifest(worker).worker_pid, 9)
            killed = time.monotonic()
    finished = events[-1].finished
    assert (finished.state, finished.failure.reason) == (pb.RUN_STATE_FAILED, "ENGINE_LOST")
    stack.wait_for(lambda: stack.client.status().attachment == detached, "the detachment")

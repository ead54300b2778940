"""Two API servers on one engine: one sidecar, one pause, one set of weights, and a successor."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from vllm.outputs import CompletionOutput

from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from tests.vllm.conftest import Stack

pytestmark = pytest.mark.vllm
TOLERANCE_NATS = 1e-4
IDS = [*range(70, 100), *range(120, 160)]
SAMPLE = {"context_ids": IDS[:30], "continuation_ids": IDS[30:]}
# Releases that stamp outputs with a weight version tell it over HTTP where this is given.
STAMPS = "weight_versions" in CompletionOutput.__dataclass_fields__
PID = r"ApiServer_\d+ pid=(\d+)"


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("a"), "qwen3")
    stamps = ["--enable-scale-out"] if STAMPS else []
    stack.start("--api-server-count", "2", "--enable-log-requests", *stamps)
    stack.wait_attached()
    yield stack
    stack.end("server")
    stack.end("vllm")


def pids_that_log(stack: Stack, text: str) -> set[int]:
    lines = [line for line in stack.log("vllm").splitlines() if text in line]
    return {int(found[1]) for line in lines if (found := re.search(PID, line))}


def directory_scores(stack: Stack) -> torch.Tensor:
    return stack.directory_logits(IDS)[:-1].gather(1, torch.tensor(IDS)[1:, None])[:, 0]


def scores_of_both_servers(stack: Stack) -> list[torch.Tensor]:
    scores: list[torch.Tensor] = []
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            scores += pool.map(stack.engine_logprobs, [IDS] * 8)
            if len(pids_that_log(stack, "Received request")) == 2:
                return scores
    pytest.fail(f"one server answered all requests:\n{stack.tail('vllm')}")


def test_one_server_has_the_sidecar_and_the_other_says_so_and_no_more(stack):
    serving = pids_that_log(stack, "apollo: the sidecar listens on")
    waiting = pids_that_log(stack, "apollo: another API server of this engine serves the sidecar")
    assert (len(serving), len(waiting), serving & waiting) == (1, 1, set())
    assert "Traceback" not in stack.log("vllm")


def test_requests_of_both_servers_wait_for_a_run_and_see_what_it_learned(stack):
    before = directory_scores(stack)
    stream = stack.client.train([SAMPLE], epochs=20, lr=3e-3, coherence="pause_run")
    while not next(stream).HasField("step"):
        pass
    during = scores_of_both_servers(stack)
    *_, last = stream
    assert last.finished.state == pb.RUN_STATE_SUCCEEDED
    stack.client.sync()
    after = directory_scores(stack)
    assert float((after - before).abs().max()) > 0.1
    for scores in during + scores_of_both_servers(stack):
        assert float((scores - after).abs().max()) < TOLERANCE_NATS


def test_an_answer_says_with_which_weights_it_was_made(stack):
    """Where vLLM has the feature (not in 0.26): at its token endpoint, with --enable-scale-out."""
    list(stack.client.train([SAMPLE], epochs=2))
    version = stack.client.status().weight_version
    assert version > 0
    if STAMPS:
        body = {"token_ids": IDS, "sampling_params": {"max_tokens": 5, "ignore_eos": True}}
        (choice,) = stack.post("/inference/v1/generate", body)["choices"]
        assert choice["weight_versions"] == [{"version": str(version), "start": 0, "end": 5}]


def test_when_the_server_with_the_sidecar_ends_nothing_stays_half_alive(stack):
    """vLLM ends as a whole unless it sees the exit status 0 in time; then the other one serves."""
    before = stack.client.status().engine_epoch
    (elected,) = pids_that_log(stack, "apollo: the sidecar listens on")
    os.kill(elected, signal.SIGTERM)

    def succeeded() -> bool:
        status = stack.client.status()
        attached = status.attachment == status_pb2.ATTACHMENT_STATE_ATTACHED
        return attached and status.engine_epoch != before

    stack.wait_for(lambda: stack.vllm.poll() is not None or succeeded(), "an end or a successor")
    if succeeded():
        *_, last = stack.client.train([SAMPLE], epochs=2)
        if last.finished.state == pb.RUN_STATE_SUCCEEDED:
            return
        # vLLM had already begun to end, and the successor with it.
        assert last.finished.failure.reason in ("ENGINE_STOPPING", "ENGINE_LOST")
    stack.wait_for(lambda: stack.vllm.poll() is not None, "the end of vLLM")

    def attached() -> bool:
        return stack.client.status().attachment == status_pb2.ATTACHMENT_STATE_ATTACHED

    stack.wait_for(lambda: not attached(), "the end of the attachment")
    with pytest.raises(Unavailable, match="VLLM_PLUGINS=apollo"):
        list(stack.client.train([SAMPLE]))

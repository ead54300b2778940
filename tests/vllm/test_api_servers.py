"""Two API servers on one engine: one sidecar, one pause, one set of weights, and a successor."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from vllm.outputs import CompletionOutput

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
    stack.start_server()
    stack.start_vllm("--api-server-count", "2", *(["--enable-scale-out"] if STAMPS else []))
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
            if len(pids_that_log(stack, "POST /v1/completions")) == 2:
                return scores
    pytest.fail(f"one server answered all requests:\n{stack.tail('vllm')}")


def test_one_server_has_the_sidecar_and_the_other_says_so_and_no_more(stack):
    serving = pids_that_log(stack, "apollo: the sidecar listens on")
    waiting = pids_that_log(stack, "apollo: another API server of this engine serves the sidecar")
    assert (len(serving), len(waiting), serving & waiting) == (1, 1, set())
    assert "Traceback" not in stack.log("vllm")

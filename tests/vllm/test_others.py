"""Others in the house of a real vLLM: its development routes pause, reload and put to sleep."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from apollo_grpc.errors import FailedPrecondition, Unavailable
from apollo_grpc.v1 import status_pb2
from apollo_grpc.v1 import training_pb2 as pb
from tests.waiting import HANG

pytestmark = pytest.mark.vllm
SAMPLE = {"context_ids": list(range(70, 100)), "continuation_ids": list(range(100, 120))}
ATTACHED = status_pb2.ATTACHMENT_STATE_ATTACHED
DETACHED = status_pb2.ATTACHMENT_STATE_DETACHED
RELOAD = ("/collective_rpc", {"method": "reload_weights"})
RESET = ("/weight_checker", {"action": "reset"})


class Owner:
    """Whoever runs vLLM, by its own HTTP routes (VLLM_SERVER_DEV_MODE=1)."""

    def __init__(self, stack: Any):
        self._base = f"http://127.0.0.1:{stack.port}"

    def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of the answer."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self._base + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=HANG) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def is_paused(self) -> bool:
        with urllib.request.urlopen(f"{self._base}/is_paused", timeout=HANG) as answer:
            return bool(json.load(answer)["is_paused"])


def train(stack: Any, **options: Any) -> list[pb.RunEvent]:
    options = {"lr": 1e-3, "epochs": 2} | options
    return list(stack.client.train([SAMPLE], **options))


def detail(stack: Any) -> str:
    return str(stack.client.status().attachment_detail)


def wait_for_detail(stack: Any, words: str) -> None:
    stack.wait_for(lambda: words in detail(stack), words)


def wait_attached_anew(stack: Any, attachments: int) -> None:
    """Until the server's log tells of one more than so many."""
    stack.wait_for(lambda: count_attachments(stack) > attachments, "another attachment")
    stack.wait_attached()


def count_attachments(stack: Any) -> int:
    return int(stack.log("server").count("attached to "))


def cancel_active(stack: Any) -> None:
    if run_id := stack.client.status().active_run_id:
        stack.client.cancel_run(run_id)


@pytest.fixture
def running(qwen3: Any) -> Callable[..., Any]:
    """Begins a long run in a thread; returns its future once it is at its second step."""
    with ThreadPoolExecutor(1) as threads:

        def start(**options: Any) -> Any:
            version = qwen3.client.status().optimizer_step
            future = threads.submit(train, qwen3, epochs=3000, lr=1e-5, min_loss=0, **options)
            qwen3.wait_for(
                lambda: qwen3.client.status().optimizer_step > version + 1 or future.done(),
                "the second step",
            )
            return future

        yield start
        cancel_active(qwen3)


@pytest.fixture
def owner(qwen3: Any) -> Iterator[Owner]:
    """Afterwards vLLM is attached, and its weights are the Apollo state's and the directory's."""
    owner = Owner(qwen3)
    yield owner
    owner.post("/wake_up")
    owner.post("/resume")
    qwen3.wait_attached()
    train(qwen3, accept_other_weights=True)
    qwen3.client.sync()


def test_a_users_pause_outlives_a_run_and_a_reload_is_noticed(qwen3: Any, owner: Owner) -> None:
    version = qwen3.client.status().weight_version
    assert owner.post("/pause?mode=keep")[0] == 200
    wait_for_detail(qwen3, "paused by somebody else")
    ended = train(qwen3)[-1].finished
    assert (ended.state, ended.weight_version) == (pb.RUN_STATE_SUCCEEDED, version + 2)
    assert owner.is_paused()
    assert owner.post("/resume")[0] == 200
    ended = train(qwen3)[-1].finished
    assert ended.state == pb.RUN_STATE_SUCCEEDED
    assert not owner.is_paused()

    attachments = count_attachments(qwen3)
    assert owner.post(*RELOAD)[0] == 200
    wait_attached_anew(qwen3, attachments)
    assert "Runs are refused" in detail(qwen3)
    with pytest.raises(FailedPrecondition) as refused:
        train(qwen3)
    assert refused.value.reason == "STATE_OF_OTHER_WEIGHTS"


@pytest.mark.long
def test_a_reload_of_what_was_synced_is_gone_on_with(qwen3: Any, owner: Owner) -> None:
    train(qwen3)
    qwen3.client.sync()
    step, attachments = qwen3.client.status().optimizer_step, count_attachments(qwen3)
    assert owner.post(*RELOAD)[0] == 200
    wait_attached_anew(qwen3, attachments)
    assert train(qwen3)[1].started.optimizer_step == step


@pytest.mark.long
@pytest.mark.parametrize("mode", ["pause_run", "live"])
def test_what_changes_weights_is_refused_beside_a_run_with_a_sentence(
    qwen3: Any, owner: Owner, running: Callable[..., Any], mode: str
) -> None:
    run = running(coherence=mode)
    for asked in (RELOAD, RESET, ("/sleep?level=1&mode=keep", None), ("/sleep?level=2", None)):
        status, text = owner.post(*asked)
        assert status == 500
        assert "is refused while a training run writes to vLLM's weights" in text
    # Nobody asked for a pause that came to be.
    assert not run.done()
    for path in ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"):
        assert owner.post(path)[0] == 200
    assert owner.post("/abort_requests", {})[0] == 200
    assert owner.post("/weight_checker", {"action": "checksum"})[0] == 200
    step = qwen3.client.status().optimizer_step
    qwen3.wait_for(lambda: qwen3.client.status().optimizer_step > step or run.done(), "a step")
    cancel_active(qwen3)
    assert run.result(HANG)[-1].finished.state == pb.RUN_STATE_CANCELLED


@pytest.mark.long
def test_a_reload_between_two_writes_ends_the_run_that_pauses_for_each(
    qwen3: Any, owner: Owner, running: Callable[..., Any]
) -> None:
    step, attachments = qwen3.client.status().optimizer_step, count_attachments(qwen3)
    run = running(coherence="pause_step")
    # It comes when no write is under way; until then it is refused.
    qwen3.wait_for(lambda: owner.post(*RELOAD)[0] == 200 or run.done(), "the reload")
    ended = run.result(HANG)[-1].finished
    assert (ended.state, ended.failure.reason) == (pb.RUN_STATE_FAILED, "WEIGHTS_CHANGED")
    wait_attached_anew(qwen3, attachments)
    ids = SAMPLE["context_ids"]
    served, disk = qwen3.engine_logprobs(ids), qwen3.directory_logits(ids)
    expected = disk[range(len(ids) - 1), ids[1:]]
    assert (served - expected).abs().max() < 1e-3, "what was reloaded is what is served"
    # The state on disk is of before the run, as the directory is: the run's steps went with it.
    assert train(qwen3)[1].started.optimizer_step == step


@pytest.mark.long
@pytest.mark.parametrize("how", ["/resume", "/wake_up"])
def test_a_user_who_lets_vllm_go_on_ends_the_run_and_vllm_answers(
    qwen3: Any, owner: Owner, running: Callable[..., Any], how: str
) -> None:
    run = running()
    assert owner.post(how)[0] == 200
    assert qwen3.complete("a")["choices"]
    ended = run.result(HANG)[-1].finished
    assert (ended.state, ended.failure.reason) == (pb.RUN_STATE_FAILED, "PAUSE_LOST")
    assert "Somebody else let vLLM go on" in ended.failure.message
    assert train(qwen3)[-1].finished.state == pb.RUN_STATE_SUCCEEDED


@pytest.mark.long
@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_a_user_who_pauses_in_mid_run_finds_vllm_paused_after_it(
    qwen3: Any, owner: Owner, running: Callable[..., Any], mode: str
) -> None:
    run = running()
    assert owner.post(f"/pause?mode={mode}")[0] == 200
    cancel_active(qwen3)
    assert run.result(HANG)[-1].finished.state == pb.RUN_STATE_CANCELLED
    assert owner.is_paused()
    assert owner.post("/resume")[0] == 200
    assert qwen3.complete("a")["choices"]


@pytest.mark.long
@pytest.mark.parametrize("level", [1, 2])
def test_a_vllm_asleep_is_let_go_and_attached_when_it_wakes(
    qwen3: Any, owner: Owner, level: int
) -> None:
    train(qwen3)
    step, attachments = qwen3.client.status().optimizer_step, count_attachments(qwen3)
    assert owner.post(f"/sleep?level={level}")[0] == 200
    wait_for_detail(qwen3, "POST /resume or /wake_up")
    assert qwen3.client.status().attachment == DETACHED
    with pytest.raises(Unavailable):
        train(qwen3)
    assert owner.post("/wake_up")[0] == 200
    wait_attached_anew(qwen3, attachments)
    assert train(qwen3)[1].started.optimizer_step == step, "on a CPU nothing of it is lost"


@pytest.mark.long
def test_weights_that_were_reset_are_refused_until_they_are_loaded_again(
    qwen3: Any, owner: Owner
) -> None:
    train(qwen3)
    qwen3.client.sync()
    attachments = count_attachments(qwen3)
    assert owner.post(*RESET)[0] == 200
    wait_for_detail(qwen3, "LIVENESS_UNPROVEN")
    with pytest.raises(FailedPrecondition):
        train(qwen3)
    assert owner.post(*RELOAD)[0] == 200
    wait_attached_anew(qwen3, attachments)
    assert train(qwen3)[-1].finished.state == pb.RUN_STATE_SUCCEEDED


@pytest.mark.long
def test_a_weight_transfer_that_cannot_begin_costs_an_attachment_and_nothing_else(
    qwen3: Any, owner: Owner
) -> None:
    train(qwen3)
    step, attachments = qwen3.client.status().optimizer_step, count_attachments(qwen3)
    status, text = owner.post("/start_weight_update")
    assert (status, "Weight transfer not configured" in text) == (500, True)
    wait_attached_anew(qwen3, attachments)
    assert train(qwen3)[1].started.optimizer_step == step

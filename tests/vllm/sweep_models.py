"""The sweep of `make models`: families beside the tested ones, with real vLLM, to docs/models.md.

No part of the test suite (pytest collects it by name only). Each family ends as one that works or
one that is refused with a reason, or is one that this vLLM itself does not serve on this machine.
"""

from __future__ import annotations

import time

import pytest
from transformers import AutoModelForImageTextToText

from apollo_client.command.doctor import stated_cause
from apollo_grpc.errors import Unavailable
from apollo_grpc.v1 import status_pb2
from tests.vllm.conftest import START_SECONDS, Stack
from tests.vllm.families import FURTHER
from tests.vllm.proof import compare, prove
from tests.vllm.records import (
    BROKEN,
    NOT_SERVED,
    REFUSED,
    mapped,
    note_proof,
    write_record,
)
from tests.vllm.wrappers import SWEPT, WITHOUT_TOWER, stand_in_for_torchvision

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3 * START_SECONDS)]
DECIDED = (status_pb2.ATTACHMENT_STATE_ATTACHED, status_pb2.ATTACHMENT_STATE_REFUSED)


def log_text(stack: Stack, name: str) -> str:
    return (stack.folder / f"{name}.log").read_text(errors="replace")


def verdict(stack: Stack) -> status_pb2.ServerStatus | None:
    """The training server's answer; None where vLLM ended by itself."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert stack.vllm is not None
        if stack.vllm.poll() is not None:
            return None
        try:
            status = stack.client.status()
        except Unavailable:
            status = status_pb2.ServerStatus()
        if status.attachment in DECIDED:
            return status
        time.sleep(0.2)
    pytest.fail(f"no verdict:\n{stack.tail('vllm')}\n{stack.tail('server')}")


def without_us(stack: Stack) -> float | None:
    """Largest difference of vLLM without the sidecar from transformers; None if it does not serve.

    What vLLM does wrong by itself is no mistake of ours, and is told apart here.
    """
    stack.end("vllm")
    (stack.folder / "vllm.log").rename(stack.folder / "vllm-with-sidecar.log")
    stack.start_vllm(plugins="none")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and stack.vllm and stack.vllm.poll() is None:
        if stack.serves():
            try:
                return compare(stack)[1]
            except OSError:
                return None
        time.sleep(0.5)
    return None


@pytest.mark.parametrize("name", FURTHER)
def test_the_family_works_or_is_refused(name, tmp_path):
    end_judged(Stack(tmp_path / "s", name))


@pytest.mark.parametrize("name", SWEPT)
def test_the_text_part_of_a_wrapper_works_or_is_refused(name, tmp_path):
    stack = Stack(tmp_path / "s", name, SWEPT[name])
    stack.auto_class = AutoModelForImageTextToText
    end_judged(stack, WITHOUT_TOWER)


def end_judged(stack: Stack, *arguments: str) -> None:
    """Starts both, records what is found, and ends them."""
    try:
        stack.start_server()
        stack.start_vllm(*arguments, before=stand_in_for_torchvision)
        judge(stack, stack.name)
    except BaseException as error:
        # Kept in the table too: a family that nobody judged would look like one that nobody tried.
        if not isinstance(error, (AssertionError, KeyboardInterrupt)):
            write_record(stack.name, BROKEN, f"{type(error).__name__}: {error}"[:300])
        raise
    finally:
        stack.end("server")
        stack.end("vllm")


def judge(stack: Stack, name: str) -> None:
    status = verdict(stack)
    if status is None:
        cause = stated_cause(log_text(stack, "vllm")).replace(str(stack.model), "MODEL")
        served = without_us(stack) is not None
        write_record(name, BROKEN if served else NOT_SERVED, cause)
        assert not served, f"vLLM serves it without the sidecar: {cause}"
        return
    if status.attachment == status_pb2.ATTACHMENT_STATE_REFUSED:
        reason = status.attachment_detail.replace(str(stack.model), "MODEL")
        ours, found = "mistake of the server's" in reason, mapped(status)
        if "LOGPROBS_DISAGREE" in reason:
            found["without_sidecar"] = alone = without_us(stack)
            ours = alone is None or alone < stack.family.tolerance_nats
        write_record(name, BROKEN if ours else REFUSED, reason, **found)
        assert not ours, f"{reason}\n{stack.tail('server')}"
        return
    stack.wait_attached()
    wrong = note_proof(stack, status, prove(stack))
    assert not wrong, wrong

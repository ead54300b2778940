"""AnswerPrompts over a real socket, on requests of vLLM's shape without vLLM."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from apollo_grpc.errors import ApolloError
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_sidecar.answers import IN_FLIGHT, MAX_ANSWER_TOKENS, MAX_PROMPTS, Answers
from apollo_sidecar.own_batch import SCORE_PREFIX
from examples.byte_model import byte_tokenizer
from tests.plain_prompts import PlainPrompts
from tests.sidecar.test_service import Served, failure, pause_by_user
from tests.waiting import HANG, wait_until

LONGEST, VOCABULARY = 12, 259


class Requests:
    """`AsyncLLM.generate` (vllm/v1/engine/async_llm.py): says the prompt backwards.

    Attributes:
        told: what each request asks for.
        going_on: requests that end wait for it.
        at_once: the most that ran beside each other.
        finish_reason: of each answer.
    """

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.aborted: list[str] = []
        self.going_on = threading.Event()
        self.going_on.set()
        self.running = self.at_once = 0
        self.finish_reason = "stop"

    async def generate(self, prompt: Any, sampling: Any, request_id: str) -> AsyncIterator[Any]:
        self.told.append(sampling)
        sampling.request_id, ids = request_id, prompt["prompt_token_ids"]
        self.running += 1
        self.at_once = max(self.at_once, self.running)
        try:
            # The longer the prompt, the sooner the answer.
            for _ in range(LONGEST - len(ids)):
                await asyncio.sleep(0)
            while not self.going_on.is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        finally:
            self.running -= 1
        said = SimpleNamespace(
            token_ids=ids[::-1][: sampling.max_tokens], finish_reason=self.finish_reason
        )
        scored = [{token: SimpleNamespace(logprob=-token / 4)} for token in ids]
        yield SimpleNamespace(outputs=[said], prompt_logprobs=[None, *scored[1:]])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    sampling = SimpleNamespace(
        SamplingParams=SimpleNamespace, RequestOutputKind=SimpleNamespace(FINAL_ONLY="once")
    )
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    folder = Path(tempfile.mkdtemp(prefix="apollo-"))
    served = Served(folder)
    served.client.model_config = SimpleNamespace(
        max_model_len=LONGEST, get_vocab_size=lambda: VOCABULARY
    )
    yield served
    served.close()
    shutil.rmtree(folder)


@pytest.fixture
def requests(served: Served) -> Requests:
    requests = Requests()
    served.client.generate = requests.generate
    return requests


def prompt(*token_ids: int, **fields: Any) -> pb.Prompt:
    return pb.Prompt(token_ids=token_ids, **{"max_tokens": 4} | fields)


def ask(served: Served, *prompts: pb.Prompt) -> list[pb.Answer]:
    request = pb.AnswerPromptsRequest(epoch=served.epoch, prompts=prompts)
    return list(served.stub.AnswerPrompts(request, timeout=HANG).answers)


def test_each_prompt_has_its_answer_whichever_is_done_first(
    served: Served, requests: Requests
) -> None:
    prompts = [prompt(*range(1, 2 + n % 5), n) for n in range(100)]
    answers = [list(answer.token_ids) for answer in ask(served, *prompts)]
    assert answers == [list(asked.token_ids)[::-1][:4] for asked in prompts]
    assert requests.at_once == IN_FLIGHT


def test_an_answer_is_the_likeliest_of_the_live_weights_and_ends_where_vllms_do(
    served: Served, requests: Requests
) -> None:
    ask(served, prompt(5, 6, max_tokens=3))
    (told,) = requests.told
    assert (told.temperature, told.max_tokens, told.skip_reading_prefix_cache) == (0, 3, True)
    assert not hasattr(told, "ignore_eos")
    assert not told.request_id.startswith(SCORE_PREFIX), "a probe repeats what was scored last"


def test_what_is_expected_is_scored_after_the_prompt_and_nothing_else(
    served: Served, requests: Requests
) -> None:
    (answer,) = ask(served, prompt(5, 6, max_tokens=0, expected_ids=[7, 8]))
    assert list(answer.expected_log_probabilities) == [-1.75, -2]
    assert list(answer.token_ids) == []
    (told,) = requests.told
    assert (told.prompt_logprobs, told.ignore_eos) == (0, True)
    assert not told.request_id.startswith(SCORE_PREFIX)
    assert ask(served, prompt(5, max_tokens=0)) == [pb.Answer()]
    assert len(requests.told) == 1


def test_texts_are_without_special_tokens(served: Served, requests: Requests) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("<|end|>ba")["input_ids"]
    answers = Answers(served.engine, PlainPrompts(tokenizer))
    (answer,) = answers.to([prompt(*ids, expected_ids=ids)])
    assert (answer.text, answer.expected_text) == ("ab", "ba")


def test_without_a_tokenizer_ids_are_all_there_is(served: Served, requests: Requests) -> None:
    (answer,) = ask(served, prompt(5, 6, expected_ids=[7]))
    assert (list(answer.token_ids), answer.text, answer.expected_text) == ([6, 5], "", "")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (pb.Prompt(max_tokens=1), "prompts[1].token_ids"),
        (prompt(5, VOCABULARY), "prompts[1].token_ids[1]"),
        (prompt(-1), "prompts[1].token_ids[0]"),
        (prompt(5, expected_ids=[6, -1]), "prompts[1].expected_ids[1]"),
        (prompt(5, max_tokens=-1), "prompts[1].max_tokens"),
        (prompt(5, max_tokens=MAX_ANSWER_TOKENS + 1), "prompts[1].max_tokens"),
        (prompt(*range(5), max_tokens=LONGEST - 4), "prompts[1].max_tokens"),
        (prompt(5, expected_ids=range(LONGEST - 1)), "prompts[1].expected_ids"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_by_field_and_none_is_asked(
    served: Served, requests: Requests, wrong: pb.Prompt, field: str
) -> None:
    error = failure(ask, served, prompt(5), wrong)
    assert [violation.field for violation in error.violations] == [field]
    assert requests.told == []


def test_the_longest_prompts_fit_and_no_more_than_a_thousand(
    served: Served, requests: Requests
) -> None:
    ask(served, prompt(*range(5), max_tokens=LONGEST - 5))
    ask(served, prompt(5, expected_ids=range(LONGEST - 2)))
    error = failure(ask, served, *[prompt(5)] * (MAX_PROMPTS + 1))
    assert error.violations[0].field == "prompts"


def test_nothing_is_answered_while_vllm_is_paused(served: Served, requests: Requests) -> None:
    served.pause()
    error = failure(ask, served, prompt(5))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "PAUSED")
    served.resume()
    pause_by_user(served)
    error = failure(ask, served, prompt(5))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "PAUSED_BY_OTHERS")
    assert requests.told == []


def test_requests_of_a_client_that_goes_away_are_aborted(
    served: Served, requests: Requests
) -> None:
    requests.going_on.clear()
    request = pb.AnswerPromptsRequest(epoch=served.epoch, prompts=[prompt(5)] * 100)
    call = served.stub.AnswerPrompts.future(request, timeout=HANG)
    wait_until(lambda: requests.running == IN_FLIGHT, "the requests")
    call.cancel()
    wait_until(lambda: len(requests.aborted) == IN_FLIGHT, "their end")
    requests.going_on.set()
    assert len(ask(served, prompt(5))) == 1
    assert len(requests.told) == IN_FLIGHT + 1, "those that waited for their turn never began"


def test_one_that_fails_is_told_and_the_others_are_aborted(
    served: Served, requests: Requests
) -> None:
    whole = requests.generate

    async def first_is_wrong(given: Any, sampling: Any, request_id: str) -> AsyncIterator[Any]:
        if given["prompt_token_ids"] == [5]:
            while requests.running < 3:
                await asyncio.sleep(0)
            raise RuntimeError("no")
        async for output in whole(given, sampling, request_id):
            yield output

    requests.going_on.clear()
    served.client.generate = first_is_wrong
    assert failure(ask, served, prompt(5), *[prompt(6)] * 3).code is grpc.StatusCode.INTERNAL
    wait_until(lambda: len(requests.aborted) == 3, "the end of the others")


def test_an_answer_that_somebody_else_had_aborted_is_none(
    served: Served, requests: Requests
) -> None:
    requests.finish_reason = "abort"
    for fields in ({}, {"max_tokens": 0, "expected_ids": [6]}):
        error: ApolloError = failure(ask, served, prompt(5, **fields))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "REQUEST_ABORTED")

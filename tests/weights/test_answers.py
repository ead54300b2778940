"""What the training server hears of prompts that it has answered, from an engine without vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apollo_grpc.errors import InvalidArgument, Unavailable
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.weights import sidecar as sidecars
from apollo_trainer.weights.sidecar import Sidecar


def test_answers_are_the_live_weights_own_and_in_order(
    start_engine: Callable[..., Any], sidecar_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecars, "PROMPTS_AT_ONCE", 2)
    engine, sidecar = start_engine(), Sidecar(sidecar_address)
    epoch = sidecar.manifest().epoch
    prompts = [
        pb.Prompt(token_ids=range(9, 12 + n), max_tokens=n, expected_ids=[70, 71]) for n in range(5)
    ]
    before = sidecar.answer(epoch, prompts)
    for n, (prompt, answer) in enumerate(zip(prompts, before, strict=True)):
        ids = list(prompt.token_ids)
        assert list(answer.token_ids) == engine.model.answer(ids, n)
        assert len(answer.token_ids) == n or answer.token_ids[-1] == 0
        scores = sidecar.score(epoch, [*ids, 70, 71])
        assert list(answer.expected_log_probabilities) == scores[-2:]
        assert answer.expected_text == engine.call(
            engine.tokens._prompts.text_of([70, 71], special=False)
        )
    with torch.no_grad():
        engine.model.module.model.norm.weight.neg_()
    after = sidecar.answer(epoch, prompts)
    assert [a.expected_log_probabilities for a in after] != [
        a.expected_log_probabilities for a in before
    ]
    sidecar.close()


def test_what_an_engine_cannot_answer_is_refused_as_vllms_sidecar_does(
    start_engine: Callable[..., Any], sidecar_address: str
) -> None:
    engine, sidecar = start_engine(), Sidecar(sidecar_address)
    epoch = sidecar.manifest().epoch
    with pytest.raises(InvalidArgument):
        sidecar.answer(epoch, [pb.Prompt(token_ids=[5], max_tokens=48)])
    sidecar.pause(epoch, "a", 30)
    with pytest.raises(Unavailable) as caught:
        sidecar.answer(epoch, [pb.Prompt(token_ids=[5], max_tokens=1)])
    assert caught.value.reason == "PAUSED"
    sidecar.resume(epoch, "a", weights_changed=False)
    assert engine.calls[-1] == "resume"
    sidecar.close()


def test_texts_of_a_folder_without_a_tokenizer_are_the_ids(
    start_engine: Callable[..., Any], sidecar_address: str, model_folder: Any
) -> None:
    for file in model_folder.glob("tokenizer*"):
        file.unlink()
    start_engine()
    sidecar = Sidecar(sidecar_address)
    prompt = pb.Prompt(token_ids=[5], expected_ids=[70, 71])
    (answer,) = sidecar.answer(sidecar.manifest().epoch, [prompt])
    assert answer.expected_text == "70 71"
    sidecar.close()

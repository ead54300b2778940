"""Snapshots outlive both services: what is learned after a restore is what was learned before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apollo_trainer.checkpoints.apollo_state import FILE_NAME, OPTIMIZER_KEY, load_state
from apollo_trainer.checkpoints.directory.state_folder import place_of
from tests.vllm.families import FAMILIES

pytestmark = pytest.mark.vllm
IDS = list(range(70, 130))
SAMPLES = [
    {"context_ids": IDS[:30], "continuation_ids": IDS[30:]},
    {"context_ids": IDS[::-1][:20], "continuation_ids": IDS[::3]},
]
# The seeded projections are drawn anew within each stretch.
OPTIONS = {"epochs": 2, "lr": 3e-3, "proj_refresh": 3}


@dataclass(frozen=True)
class Learned:
    """All that further learning depends on, by digests, and how it was reached."""

    losses: list[float]
    weights: dict[str, str]
    moments: dict[str, str]
    optimizer: dict[str, Any]
    served: list[float]


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    flat = {name: t.contiguous().flatten().view(torch.uint8) for name, t in tensors.items()}
    return {name: sha256(t.numpy().tobytes()).hexdigest() for name, t in flat.items()}


def learn(stack: Any, folder: Path, **options: Any) -> Learned:
    """Some steps; then weights by way of an export, moments and generators of a snapshot."""
    events = list(stack.client.train(SAMPLES, **OPTIONS, **options))
    losses = [event.step.loss for event in events if event.HasField("step")]
    assert len(losses) == 4, events[-1]
    stack.client.export(folder)
    weights = {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}
    snapshot = stack.client.create_snapshot().snapshot_id
    state = load_state(place_of(stack.model).state / "snapshots" / snapshot / FILE_NAME)
    assert state
    moments, description = state
    assert moments
    served = stack.engine_logprobs(IDS).tolist()
    return Learned(losses, digests(weights), digests(moments), description[OPTIMIZER_KEY], served)


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def stack(request: pytest.FixtureRequest, stacks: Any) -> Iterator[Any]:
    """Qwen3: float32 is the one that tests share; bfloat16 is rounded stochastically."""
    if request.param == "float32":
        yield stacks("qwen3")
        return
    family = replace(FAMILIES["qwen3"], dtype=request.param)
    yield stacks(request.param, family)
    stacks.end(request.param)


def test_both_services_restart_and_learn_bit_for_bit_what_they_had_learned(
    stack: Any, tmp_path: Path
) -> None:
    client = stack.client
    learn(stack, tmp_path / "before", accept_other_weights=True)
    client.create_snapshot("synced later")
    learned = {"synced later": learn(stack, tmp_path / "first")}
    client.sync()
    client.create_snapshot("as synced")
    learned["as synced"] = learn(stack, tmp_path / "second")
    client.create_snapshot("never synced")
    learned["never synced"] = learn(stack, tmp_path / "third")
    assert len({each.weights["model.norm.weight"] for each in learned.values()}) == 3

    epoch = client.status().engine_epoch
    assert stack.end("server") == 0
    stack.end("vllm")
    stack.start()
    assert stack.wait_attached().engine_epoch != epoch
    assert stack.engine_logprobs(IDS).tolist() == learned["synced later"].served
    assert not client.verify(full=True, live=True).differences, "vLLM came from the directory"

    for name in ("as synced", "never synced", "synced later"):
        client.restore(name)
        assert learn(stack, tmp_path / f"again {name}") == learned[name], name
        client.delete_snapshot(name)

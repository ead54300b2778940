"""Hybrids with Mamba 2, of whose A_log vLLM keeps -exp(A_log), and rows in another order.

`granitemoehybrid` is Granite 4 H: a Mamba 2 layer and one of attention, with experts. `llama4` has
the rows of its queries and keys in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from apollo_grpc.v1 import status_pb2
from tests.vllm.proof import prompt, prove
from tests.vllm.records import note_proof, what_is_wrong

pytestmark = pytest.mark.vllm
A_LOG = "model.layers.0.mamba.A_log"
QUERY = "model.layers.0.self_attn.q_proj.weight"
SAMPLE: Any = {"context_ids": prompt(30, seed=3), "continuation_ids": prompt(30, seed=4)}


@pytest.fixture(scope="module")
def hybrid(stacks: Any) -> Any:
    stack = stacks("granitemoehybrid")
    yield stack
    stacks.end("granitemoehybrid")


@pytest.fixture(scope="module")
def reordered(stacks: Any) -> Any:
    stack = stacks("llama4")
    yield stack
    stacks.end("llama4")


def proven(stack: Any) -> status_pb2.ServerStatus:
    """The status of a stack whose sides agree before and after training."""
    status = stack.client.status()
    proof = prove(stack)
    note_proof(stack, status, proof)
    assert what_is_wrong(stack.family.tolerance_nats, status, proof) == ""
    return status


def learn(stack: Any) -> None:
    list(stack.client.train([SAMPLE], epochs=2, lr=3e-3))


def stored(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every tensor of a model directory."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = (tensor.dtype, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


def names_in(folder: Path) -> set[str]:
    """Names of the tensors in all safetensors below a folder."""
    found = set[str]()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update(file.keys())
    return found


def test_both_sides_agree_before_and_after_training_all_but_the_derived(hybrid):
    status = proven(hybrid)
    assert list(status.weight_map.derived) == [A_LOG]
    assert status.weight_map.views == status.weight_map.parameters - 1
    assert not status.weight_map.refused
    assert f"not trained and stay as they are in the model directory: {A_LOG}" in (
        status.attachment_detail
    )


def test_a_derived_parameter_is_the_same_bytes_after_sync_restore_undo_and_export(hybrid, tmp_path):
    at_first = stored(hybrid.model)
    learn(hybrid)
    hybrid.client.create_snapshot("learned")
    assert hybrid.client.sync().tensors_changed > 0
    synced = stored(hybrid.model)
    assert synced[A_LOG] == at_first[A_LOG]
    assert {name for name in synced if synced[name] == at_first[name]} == {A_LOG}

    learn(hybrid)
    hybrid.client.undo(1)
    hybrid.client.restore("learned")
    hybrid.client.export(tmp_path / "exported")
    assert stored(tmp_path / "exported") == synced
    hybrid.client.sync()
    assert stored(hybrid.model) == synced


def test_neither_state_nor_snapshots_have_one(hybrid):
    hybrid.client.create_snapshot("state")
    kept = names_in(hybrid.state)
    assert any("mamba.D" in name for name in kept)
    assert not [name for name in kept if "A_log" in name]


@pytest.mark.long
def test_both_sides_agree_where_vllm_has_the_rows_in_another_order(reordered):
    before = stored(reordered.model)
    status = proven(reordered)
    assert status.weight_map.views == status.weight_map.parameters
    assert stored(reordered.model)[QUERY] != before[QUERY]

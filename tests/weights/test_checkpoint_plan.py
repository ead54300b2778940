"""The plan names every checkpoint tensor as the region of the parameter that it is."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

from apollo_trainer.weights.checkpoint_plan import CheckpointPlan, CheckpointTensor, plan_checkpoint
from apollo_trainer.weights.live_model import meta_model
from examples.byte_model import write_model

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False),
}


def files_of(directory):
    stored = {}
    for path in directory.glob("*.safetensors"):
        stored |= load_file(path)
    return stored


def require_the_files_bytes(found, directory):
    stored = files_of(directory)
    names = {tensor.name for tensor in found.plan.tensors}
    assert names == stored.keys()
    for tensor in found.plan.tensors:
        value = found.plan.read(tensor, found.views[tensor.root])
        assert value.is_contiguous()
        assert torch.equal(value, stored[tensor.name]), tensor.name


def test_a_parameter_that_begins_within_the_storage_gives_its_own_values():
    storage = torch.arange(100.0)
    plan = CheckpointPlan({"w": (4, 3)}, {}, ())
    tensor = CheckpointTensor("w.rows", "w", (2, 3), (3, 1), 6)
    parameter = storage[40:52].view(4, 3)
    assert torch.equal(plan.read(tensor, parameter), torch.arange(46.0, 52.0).view(2, 3))


@pytest.mark.parametrize("parameter", [torch.arange(40.0, 52.0).view(3, 4).t()])
def test_a_transposed_parameter_is_read_in_its_own_order(parameter):
    plan = CheckpointPlan({"w": (4, 3)}, {}, ())
    tensor = CheckpointTensor("w.rows", "w", (2, 3), (3, 1), 6)
    assert torch.equal(plan.read(tensor, parameter), parameter[2:])


def test_reading_twice_gives_a_copy_or_a_view_but_never_writes(tmp_path, config, live):
    found = live(write_model(tmp_path, config(), seed=1))
    before = found.memory.clone()
    for tensor in found.plan.tensors:
        found.plan.read(tensor, found.views[tensor.root])
    assert torch.equal(found.memory, before)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_saved_file_is_read_out_of_the_live_memory(
    tmp_path, config, live, tied
):
    directory = write_model(tmp_path, config(tie_word_embeddings=tied), seed=1)
    require_the_files_bytes(live(directory), directory)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_families_are_read_as_transformers_saves_them(tmp_path, live, family):
    directory = write_model(tmp_path, FAMILIES[family](), seed=2)
    require_the_files_bytes(live(directory), directory)


def test_the_experts_of_one_parameter_become_a_tensor_each(tmp_path, live):
    found = live(write_model(tmp_path, FAMILIES["qwen3_moe"](), seed=2))
    root = "model.layers.0.mlp.experts.down_proj"
    cut = [t for t in found.plan.tensors if t.root == root]
    assert found.plan.roots[root] == (4, 32, 16)
    assert sorted(t.offset for t in cut) == [0, 512, 1024, 1536]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_tensors_cover_each_parameter_exactly_once(tmp_path, family):
    plan = plan_checkpoint(meta_model(str(write_model(tmp_path, FAMILIES[family](), seed=2))))
    for root, shape in plan.roots.items():
        counts = torch.zeros(shape).view(-1)
        for tensor in plan.tensors:
            if tensor.root == root:
                counts.as_strided(tensor.shape, tensor.stride, tensor.offset).add_(1)
        assert torch.equal(counts, torch.ones_like(counts)), root


def test_tied_embeddings_are_planned_once_and_named_as_tied(tmp_path, config):
    plan = plan_checkpoint(meta_model(str(write_model(tmp_path, config(), seed=1))))
    assert plan.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in plan.roots
    assert [t.name for t in plan.tensors if t.root == "model.embed_tokens.weight"] == [
        "model.embed_tokens.weight"
    ]


def test_experts_that_lie_stacked_in_the_directory_are_planned_so(tmp_path):
    model = meta_model(str(write_model(tmp_path, FAMILIES["qwen3_moe"](), seed=2)))
    apart, stacked = plan_checkpoint(model), plan_checkpoint(model, dict(model.named_parameters()))
    names = {tensor.name for tensor in stacked.tensors}
    assert names == stacked.roots.keys() != {tensor.name for tensor in apart.tensors}
    assert plan_checkpoint(model, [tensor.name for tensor in apart.tensors]) == apart


def test_a_tied_head_has_the_name_that_the_directory_has_for_it(tmp_path, config):
    model = meta_model(str(write_model(tmp_path, config(), seed=1)))
    held = {f"language_model.{tensor.name}" for tensor in plan_checkpoint(model).tensors}
    plan = plan_checkpoint(model, held | {"language_model.lm_head.weight"})
    assert plan.tied == {"language_model.lm_head.weight": "model.embed_tokens.weight"}
    assert plan.untrained == ()
    assert {tensor.name for tensor in plan.tensors} == held


def test_names_that_no_plan_fits_leave_those_of_transformers(tmp_path, config):
    model = meta_model(str(write_model(tmp_path, config(), seed=1)))
    assert plan_checkpoint(model, {"blk.0.attn_q.weight"}) == plan_checkpoint(model)


def test_the_request_carries_the_whole_plan(tmp_path, config):
    plan = plan_checkpoint(meta_model(str(write_model(tmp_path, config(), seed=1))))
    request = plan.request("e")
    assert request.epoch == "e"
    assert {r.name: tuple(r.shape) for r in request.roots} == plan.roots
    sent = {
        CheckpointTensor(t.checkpoint_name, t.root, tuple(t.shape), tuple(t.stride), t.offset)
        for t in request.tensors
    }
    assert sent == set(plan.tensors)

"""Values that nobody trains come from the model directory, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights.checkpoint_plan import persistent_buffers, plan_checkpoint
from apollo_trainer.weights.fixed_values import fill_fixed_values
from apollo_trainer.weights.live_model import fill_with_views, meta_model
from examples.byte_model import write_model

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def directory(tmp_path):
    config = Glm4MoeConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        initializer_range=0.08,
        eos_token_id=0,
        pad_token_id=0,
    )
    write_model(tmp_path, config, seed=3)
    rewrite(tmp_path, lambda tensors: tensors[BIAS].copy_(torch.tensor([0.5, -0.25, 1.0, 0.0])))
    return tmp_path


def rewrite(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def filled(directory):
    """The training model over parameters of transformers' own."""
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = meta_model(str(directory))
    plan = plan_checkpoint(model)
    values = dict(original.named_parameters())
    fill_with_views(model, plan, {name: values[name].detach() for name in plan.roots})
    fill_fixed_values(model, plan, directory)
    return model, original, plan


def test_a_routers_correction_bias_is_that_of_the_directory(directory):
    model, original, plan = filled(directory)
    assert plan.fixed == {BIAS: BIAS}
    assert BIAS not in plan.roots
    bias = persistent_buffers(model)[BIAS]
    assert bias.tolist() == [0.5, -0.25, 1.0, 0.0]
    assert not bias.requires_grad
    ids = torch.arange(20)[None] * 7 % 259
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)


def test_one_that_the_directory_leaves_out_is_as_transformers_would_have_it(directory):
    rewrite(directory, lambda tensors: tensors.pop(BIAS))
    model, original, _ = filled(directory)
    assert torch.equal(persistent_buffers(model)[BIAS], persistent_buffers(original)[BIAS])


def refused(directory):
    model = meta_model(str(directory))
    with pytest.raises(FailedPrecondition, match="e_score_correction_bias") as error:
        fill_fixed_values(model, plan_checkpoint(model), directory)
    assert error.value.reason == "FIXED_VALUES_UNREADABLE"
    return error.value.message


def test_a_directory_without_safetensors_is_refused(directory):
    (directory / "model.safetensors").unlink()
    assert "no safetensors" in refused(directory)


def test_a_damaged_file_is_refused_by_its_name(directory):
    (directory / "model.safetensors").write_bytes(b"no weights at all")
    assert "model.safetensors" in refused(directory)


def test_values_of_another_shape_are_refused(directory):
    rewrite(directory, lambda tensors: tensors.update({BIAS: torch.zeros(3)}))
    model = meta_model(str(directory))
    plan = plan_checkpoint(model)
    for name, buffer in persistent_buffers(model).items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = torch.zeros(buffer.shape)
    with pytest.raises(FailedPrecondition, match=r"shape \(3,\)") as error:
        fill_fixed_values(model, plan, directory)
    assert error.value.reason == "FIXED_VALUES_UNREADABLE"

"""Values that nobody trains come from the model directory, or the model is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Mamba2Config

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights.checkpoint_plan import (
    CheckpointTensor,
    persistent_buffers,
    plan_checkpoint,
)
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.fixed_values import (
    MAX_DERIVED,
    derived_parameters,
    fill_fixed_values,
    fix_parameters,
    told_derived,
)
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


# --- derived parameters ---------------------------------------------------------------------

A_LOG = "backbone.layers.0.mixer.A_log"
IDS = torch.arange(20)[None] * 7 % 259


@pytest.fixture
def mamba(tmp_path):
    config = Mamba2Config(
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=1,
        state_size=8,
        num_heads=2,
        head_dim=64,
        n_groups=1,
        chunk_size=16,
        initializer_range=0.08,
        eos_token_id=0,
        pad_token_id=0,
    )
    write_model(tmp_path, config, seed=3)
    rewrite(tmp_path, lambda tensors: tensors[A_LOG].copy_(torch.tensor([0.3, -1.2])))
    return tmp_path


def derived(directory, dtype=torch.float32):
    """The training model with a derived parameter, over parameters of transformers' own."""
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = meta_model(str(directory))
    plan = plan_checkpoint(model)
    plan = fix_parameters(model, plan, derived_parameters(plan, {A_LOG}))
    values = dict(original.named_parameters())
    fill_with_views(model, plan, {name: values[name].detach().to(dtype) for name in plan.roots})
    fill_fixed_values(model, plan, directory, [A_LOG])
    return model, original, plan


def test_a_derived_parameter_is_no_parameter_and_computes_as_the_directory_has_it(mamba):
    model, original, plan = derived(mamba)
    assert A_LOG not in dict(model.named_parameters())
    assert plan.fixed == {A_LOG: A_LOG}
    values = dict(model.named_buffers())[A_LOG]
    torch.testing.assert_close(values, torch.tensor([0.3, -1.2]))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits)


def test_its_values_are_those_of_the_directory_whatever_the_weights_are_rounded_to(mamba):
    model, _, _ = derived(mamba, torch.bfloat16)
    assert model.get_parameter("backbone.layers.0.mixer.D").dtype is torch.bfloat16
    torch.testing.assert_close(dict(model.named_buffers())[A_LOG], torch.tensor([0.3, -1.2]))


def test_neither_training_nor_reading_the_live_weights_touches_it(mamba):
    model, _, plan = derived(mamba)
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(dict(model.named_buffers())[A_LOG], torch.tensor([0.3, -1.2]))
    reader = CheckpointReader(plan, dict(model.named_parameters()))
    assert reader.read(A_LOG) is None
    assert A_LOG not in reader.names()
    assert reader.missing_from({t.name for t in plan.tensors}) == []


def test_one_that_the_directory_does_not_hold_is_refused_by_name(mamba):
    rewrite(mamba, lambda tensors: tensors.pop(A_LOG))
    with pytest.raises(FailedPrecondition, match="A_log") as error:
        derived(mamba)
    assert error.value.reason == "FIXED_VALUES_UNREADABLE"


def test_more_than_a_ten_thousandth_of_the_model_is_not_left_untrained(mamba):
    plan = plan_checkpoint(meta_model(str(mamba)))
    total = sum(torch.Size(shape).numel() for shape in plan.roots.values())
    others = ["backbone.layers.0.mixer.D", "backbone.layers.0.mixer.dt_bias"]
    assert 2 / total <= MAX_DERIVED < 6 / total
    assert derived_parameters(plan, {A_LOG}) == [A_LOG]
    assert derived_parameters(plan, {A_LOG, *others}) == []


def test_one_that_is_cut_from_several_checkpoint_tensors_is_none(mamba):
    plan = plan_checkpoint(meta_model(str(mamba)))
    halves = [
        CheckpointTensor(f"{A_LOG}.{i}", A_LOG, (1,), (1,), i) for i in range(plan.roots[A_LOG][0])
    ]
    others = [tensor for tensor in plan.tensors if tensor.root != A_LOG]
    assert derived_parameters(replace(plan, tensors=(*others, *halves)), {A_LOG}) == []


def test_they_are_told_by_name():
    assert told_derived([]) == ""
    assert A_LOG in told_derived([A_LOG])
    assert "not trained" in told_derived([A_LOG])

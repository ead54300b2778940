"""Mapped weights are compared with the directory that they are said to come from."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights import values
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.values import require_checkpoint_values
from examples.byte_model import write_model

EXPERTS_OF = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def mapped(tmp_path, config, live):
    made = live(write_model(tmp_path / "model", config(vocab_size=700), seed=3))
    made.reader = CheckpointReader(made.plan, dict(made.model.named_parameters()))
    return made


@pytest.mark.parametrize("everything", [False, True])
def test_weights_as_they_were_loaded_are_accepted(mapped, everything, monkeypatch):
    monkeypatch.setattr(values, "BLOCK_ELEMENTS", 64)
    compared = require_checkpoint_values(mapped.directory, mapped.reader, everything)
    whole = sum(p.numel() for p in mapped.model.parameters())
    assert compared == whole if everything else 0 < compared < whole


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("end", [0, -1])
def test_another_value_at_either_end_is_refused_by_name(mapped, name, end):
    with torch.no_grad():
        mapped.model.get_parameter(name).view(-1)[end] += 1.0
    with pytest.raises(FailedPrecondition, match=rf"{name} \(holds other values") as caught:
        require_checkpoint_values(mapped.directory, mapped.reader, False)
    assert caught.value.reason == "VALUES_DIFFER"


def test_one_value_among_all_is_found_where_all_are_compared(mapped):
    name = "model.layers.0.self_attn.q_proj.weight"
    for place in (7, 300, 1023):
        with torch.no_grad():
            mapped.model.get_parameter(name).view(-1)[place] *= -1
        with pytest.raises(FailedPrecondition, match=name):
            require_checkpoint_values(mapped.directory, mapped.reader, True)
        with torch.no_grad():
            mapped.model.get_parameter(name).view(-1)[place] *= -1
    assert require_checkpoint_values(mapped.directory, mapped.reader, True)


def test_the_directorys_dtype_is_converted_as_by_the_engine(mapped):
    file = mapped.directory / "model.safetensors"
    tensors = {name: t.to(torch.float64) for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert require_checkpoint_values(mapped.directory, mapped.reader, True)


def test_a_tensor_of_another_shape_is_refused_by_name(mapped):
    file = mapped.directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FailedPrecondition, match=r"model\.norm\.weight \(has the shape \[31\]"):
        require_checkpoint_values(mapped.directory, mapped.reader, False)


def refused(mapped):
    with pytest.raises(FailedPrecondition) as caught:
        require_checkpoint_values(mapped.directory, mapped.reader, False)
    return caught.value


def test_a_directory_without_safetensors_is_refused(mapped):
    (mapped.directory / "model.safetensors").unlink()
    assert refused(mapped).reason == "VALUES_NOT_COMPARED"


def rename(mapped, change):
    file = mapped.directory / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})


def test_shards_with_other_names_are_refused_although_nothing_differs(mapped):
    rename(mapped, lambda name: f"transformer.{name}")
    error = refused(mapped)
    assert error.reason == "VALUES_NOT_COMPARED"
    assert "model.embed_tokens.weight" in error.message
    assert "--no-check-values" in error.message


def test_a_single_tensor_that_no_shard_holds_is_refused_by_name(mapped):
    rename(mapped, lambda name: None if name == "model.norm.weight" else name)
    error = refused(mapped)
    assert error.reason == "VALUES_NOT_COMPARED"
    assert "holds model.norm.weight, so that" in error.message


def test_a_tied_weight_may_stand_under_either_of_its_names(mapped):
    rename(mapped, lambda name: name.replace("model.embed_tokens.weight", "lm_head.weight"))
    assert require_checkpoint_values(mapped.directory, mapped.reader, False)


def test_a_stack_of_experts_with_one_missing_is_refused(tmp_path, live):
    config = Qwen3MoeConfig(
        **EXPERTS_OF, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    made = live(write_model(tmp_path / "model", config, seed=3))
    made.reader = CheckpointReader(made.plan, dict(made.model.named_parameters()))
    assert require_checkpoint_values(made.directory, made.reader, True)
    lost = "model.layers.1.mlp.experts.2.up_proj.weight"
    rename(made, lambda name: None if name == lost else name)
    assert lost in refused(made).message


def test_a_broken_file_is_refused(mapped):
    (mapped.directory / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(FailedPrecondition, match=r"model\.safetensors"):
        require_checkpoint_values(mapped.directory, mapped.reader, False)


def test_of_many_tensors_three_are_named_and_all_are_kept(mapped):
    with torch.no_grad():
        for parameter in mapped.model.parameters():
            parameter.add_(1.0)
    error, names = refused(mapped), mapped.reader.names()
    assert error.message.startswith(f"{len(names)} of {len(names)} tensors")
    assert [name in error.message for name in error.tensors].count(True) == 3
    assert f"and {len(names) - 3} more" in error.message
    assert error.tensors == dict.fromkeys(names, "holds other values in model.safetensors")


def test_of_many_missing_tensors_three_are_named_and_all_are_kept(mapped):
    rename(mapped, lambda name: f"transformer.{name}")
    error = refused(mapped)
    assert set(error.tensors) == set(mapped.reader.names())
    assert sum(name in error.message for name in error.tensors) == 3


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-q4.gguf"])
def test_weights_that_are_not_read_are_named(mapped, name):
    (mapped.directory / "model.safetensors").rename(mapped.directory / name)
    error = refused(mapped)
    assert error.reason == "VALUES_NOT_COMPARED"
    assert f"{name}, which is not read" in error.message


def test_a_head_of_its_own_in_a_tied_model_is_told_as_that(mapped):
    file = mapped.directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert require_checkpoint_values(mapped.directory, mapped.reader, True)
    tensors["lm_head.weight"][0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    error = refused(mapped)
    assert error.reason == "TIED_WEIGHTS_DIFFER"
    assert "ties lm_head.weight to model.embed_tokens.weight" in error.message
    assert set(error.tensors) == {"lm_head.weight"}


def test_one_row_of_a_tied_head_that_is_another_one_is_found_among_many(mapped):
    file = mapped.directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][317, 5] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    assert refused(mapped).reason == "TIED_WEIGHTS_DIFFER"


def test_of_a_tensor_in_two_files_the_one_that_is_served_is_compared(mapped):
    """transformers loads model.safetensors, and vLLM what the index names."""
    file = mapped.directory / "model.safetensors"
    tensors = load_file(file)
    served = mapped.directory / "a.safetensors"
    save_file(tensors, served, metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, served.name)
    (mapped.directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map, "metadata": {}})
    )
    save_file({name: t * 0 for name, t in tensors.items()}, file, metadata={"format": "pt"})
    assert require_checkpoint_values(mapped.directory, mapped.reader, True)
    served.rename(served.with_name("z.safetensors"))
    (mapped.directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "z.safetensors"), "metadata": {}})
    )
    assert require_checkpoint_values(mapped.directory, mapped.reader, True)


def test_one_expert_of_many_with_other_values_is_no_tied_weight(tmp_path, live):
    config = Qwen3MoeConfig(
        **EXPERTS_OF, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    made = live(write_model(tmp_path / "model", config, seed=3))
    made.reader = CheckpointReader(made.plan, dict(made.model.named_parameters()))
    file, changed = (
        made.directory / "model.safetensors",
        "model.layers.1.mlp.experts.2.up_proj.weight",
    )
    tensors = load_file(file)
    tensors[changed] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    error = refused(made)
    assert (error.reason, set(error.tensors)) == ("VALUES_DIFFER", {changed})

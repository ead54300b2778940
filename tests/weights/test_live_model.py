"""The model over views is the served model, computes as it does, and writes in its memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Gemma2Config, Gemma3Config, Qwen3VLConfig

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.directory_names import held_names
from apollo_trainer.weights.live_model import fill_with_views, meta_model
from examples.byte_model import save_model, write_model

IDS = torch.arange(40).view(2, 20) * 6 % 259
GEMMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def refused(call, *args):
    with pytest.raises(FailedPrecondition) as error:
        call(*args)
    return error.value


@pytest.mark.parametrize("changed", [{}, {"tie_word_embeddings": False}, {"rope_parameters": ROPE}])
def test_the_model_over_views_computes_what_the_directory_holds(tmp_path, config, live, changed):
    found = live(write_model(tmp_path, config(**changed), seed=3))
    assert torch.equal(logits(found.model), logits(found.original))


def test_filling_leaves_every_byte_as_it_was_and_copies_none(tmp_path, config, live):
    found = live(write_model(tmp_path, config(), seed=3))
    values = dict(found.original.named_parameters())
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, values[name])
        assert parameter.data_ptr() == found.views[name].data_ptr()
        assert parameter.requires_grad
    assert (found.memory == 9.0).sum() >= 5 * len(values)


def test_a_write_to_the_memory_changes_the_next_answer(tmp_path, config, live):
    found = live(write_model(tmp_path, config(), seed=3))
    before = logits(found.model)
    found.memory.mul_(1.1)
    assert not torch.allclose(logits(found.model), before)


def test_a_training_step_writes_the_memory_and_nothing_beside_it(tmp_path, config, live):
    found = live(write_model(tmp_path, config(), seed=3))
    before = found.memory.clone()
    inside = torch.zeros_like(found.memory, dtype=torch.bool)
    for view in found.views.values():
        start = int(view.storage_offset())
        inside[start : start + view.numel()] = True
    found.model(IDS, labels=IDS, use_cache=False).loss.backward()
    torch.optim.SGD(found.model.parameters(), lr=0.1).step()
    assert torch.equal(found.memory[~inside], before[~inside])
    assert (found.memory[inside] != before[inside]).float().mean() > 0.5


def test_tied_embeddings_are_one_parameter(tmp_path, config, live):
    model = live(write_model(tmp_path, config(), seed=3)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = live(write_model(tmp_path / "u", config(tie_word_embeddings=False), seed=3)).model
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_dropout_is_off(tmp_path, config, live):
    model = live(write_model(tmp_path, config(attention_dropout=0.5), seed=3)).model
    assert not model.training
    assert torch.equal(logits(model), logits(model))


def test_a_model_with_a_parameter_that_nothing_fills_is_refused_by_name(tmp_path, config, live):
    found = live(write_model(tmp_path, config(), seed=3))
    model = meta_model(str(tmp_path))
    plan = plan_checkpoint(model)
    del found.views["model.norm.weight"]
    error = refused(fill_with_views, model, plan, found.views)
    assert error.reason == "MODEL_INCOMPLETE"
    assert "model.norm.weight" in error.message


def test_building_the_model_takes_no_memory_for_weights(tmp_path, config):
    model = meta_model(str(write_model(tmp_path, config(), seed=3)))
    assert all(parameter.is_meta for parameter in model.parameters())


def edited(directory, **changed):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return str(directory)


def test_a_quantised_model_is_refused(tmp_path, config):
    directory = write_model(tmp_path, config(), seed=3)
    quantised = edited(directory, quantization_config={"quant_method": "fp8"})
    assert refused(meta_model, quantised).reason == "QUANTIZED"


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path, config):
    unknown = edited(write_model(tmp_path, config(), seed=3), model_type="no_such_model")
    assert refused(meta_model, unknown).reason == "MODEL_UNSUPPORTED"


def test_a_directory_that_is_not_there_is_refused_without_its_path(tmp_path):
    error = refused(meta_model, str(tmp_path / "absent"))
    assert error.reason == "MODEL_UNSUPPORTED"
    assert "absent" not in error.message


def test_a_soft_cap_on_attention_is_computed(tmp_path):
    Gemma2Config(**GEMMA, attn_logit_softcapping=2.0).save_pretrained(tmp_path)
    assert meta_model(str(tmp_path)).config._attn_implementation == "eager"


def composite(directory, **text):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config=GEMMA | text, vision_config=vision | {"num_attention_heads": 2}
    )
    config.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(("cap", "attention"), [(2.0, "eager"), (None, "sdpa")])
def test_a_soft_cap_in_the_text_part_of_a_composite_model_is_computed(tmp_path, cap, attention):
    model = meta_model(composite(tmp_path, attn_logit_softcapping=cap))
    assert model.config.get_text_config()._attn_implementation == attention


def test_a_composite_model_whose_text_part_is_quantised_is_refused(tmp_path):
    quantised = composite(tmp_path, quantization_config={"quant_method": "fp8"})
    assert refused(meta_model, quantised).reason == "QUANTIZED"


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
WRAPPERS = {
    "gemma3": (
        lambda: Gemma3Config(
            text_config=GEMMA | {"vocab_size": 259},
            vision_config=TOWER | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        ),
        ("vision_tower.", "multi_modal_projector."),
    ),
    # transformers has no class for the text of this one alone.
    "qwen3_vl": (
        lambda: Qwen3VLConfig(
            text_config=GEMMA
            | {"vocab_size": 259, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32},
        ),
        ("model.visual.",),
    ),
}


def wrapper(directory, family):
    torch.manual_seed(3)
    config, towers = WRAPPERS[family]
    original = AutoModelForImageTextToText.from_config(config()).eval()
    save_model(directory, original)
    return original, load_file(directory / "model.safetensors"), towers


@pytest.mark.parametrize("family", sorted(WRAPPERS))
def test_the_text_part_of_a_wrapper_computes_what_the_whole_does(tmp_path, family):
    original, stored, _ = wrapper(tmp_path, family)
    model = meta_model(str(tmp_path))
    plan = plan_checkpoint(model, held_names(tmp_path))
    fill_with_views(model, plan, {t.root: stored[t.name] for t in plan.tensors})
    assert torch.equal(logits(model), logits(original))


@pytest.mark.parametrize("family", sorted(WRAPPERS))
def test_a_tower_is_no_part_of_the_model_and_its_names_are_told_as_untrained(tmp_path, family):
    _, stored, towers = wrapper(tmp_path, family)
    model = meta_model(str(tmp_path))
    plan = plan_checkpoint(model, held_names(tmp_path))
    rest = {name for name in stored if name.startswith(towers)}
    assert set(plan.untrained) == rest != set()
    assert {tensor.name for tensor in plan.tensors} == stored.keys() - rest
    trained = sum(stored[name].numel() for name in stored.keys() - rest)
    assert sum(parameter.numel() for parameter in model.parameters()) == trained


def test_settings_of_a_wrapper_are_those_of_its_text_part(tmp_path):
    config = meta_model(composite(tmp_path, sliding_window=48)).config
    assert (config.sliding_window, config.hidden_size) == (48, GEMMA["hidden_size"])

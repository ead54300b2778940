"""The text part of a directory is found by the names that it holds, or by none."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights.directory_names import (
    Prefix,
    find_prefix,
    held_names,
    shared_prefix,
    told_parts,
)

DECODER = ("embed_tokens.weight", "layers.0.mlp.weight", "norm.weight")
TEXT = {f"model.{name}" for name in DECODER} | {"lm_head.weight"}


def held(prefix, *others):
    return {prefix + name for name in DECODER} | set(others)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.", "lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("language_model.model.", "lm_head.weight"),
        ("thinker.model.", "thinker.lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_the_prefix_is_the_one_that_the_directory_has(prefix, head):
    names = held(prefix, head, "model.visual.layers.0.mlp.weight", "mtp.layers.0.mlp.weight")
    found = find_prefix(TEXT, "model.", names)
    assert found == Prefix("model.", prefix)
    assert {found.name(name, names) for name in TEXT} == held(prefix, head)


def test_a_directory_that_lacks_a_tensor_has_no_prefix():
    names = held("language_model.model.", "lm_head.weight")
    assert find_prefix(TEXT, "model.", names - {"language_model.model.norm.weight"}) is None
    assert find_prefix(TEXT, "model.", names - {"lm_head.weight"}) is None
    assert find_prefix(TEXT, "model.", ()) is None


def test_names_that_only_end_alike_are_others():
    assert find_prefix({"model.norm.weight"}, "model.", {"visual.layer_norm.weight"}) is None


def test_the_models_own_names_go_before_others():
    both = held("model.") | held("talker.model.", "lm_head.weight", "talker.lm_head.weight")
    assert find_prefix(TEXT, "model.", both) == Prefix("model.", "model.")


def test_two_text_parts_are_refused_by_name():
    both = held("a.model.", "lm_head.weight") | held("b.model.")
    with pytest.raises(FailedPrecondition, match=r"a\.model\.\* and b\.model\.\*") as error:
        find_prefix(TEXT, "model.", both)
    assert error.value.reason == "TEXT_PART_UNKNOWN"


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["model.norm.weight", "model.layers.0.a"], "model."),
        (["model.layers.0.a", "model.layers.0.b"], "model.layers.0."),
        (["embed.weight", "embed_norm.weight"], ""),
        ([], ""),
    ],
)
def test_a_shared_prefix_ends_with_a_dot(names, prefix):
    assert shared_prefix(names) == prefix


def test_both_parts_are_told_with_their_sizes():
    others = ["model.visual.a", "model.visual.b.c", "mtp.fc.weight"]
    text = ["lm_head.weight", "model.language_model.norm.weight"]
    assert told_parts(text, others) == (
        "Trained is lm_head (1 tensor), model.language_model (1 tensor). The rest stays as it is, "
        "made for the weights before training: model.visual (2 tensors), mtp (1 tensor)."
    )
    assert told_parts(text, []) == ""


def test_many_parts_are_counted():
    told = told_parts(["model.norm.weight"], [f"part{number}.weight" for number in range(9)])
    assert told.endswith("part4 (1 tensor), 4 more parts.")


def test_the_names_are_those_of_the_files_that_are_loaded(tmp_path):
    assert held_names(tmp_path) == frozenset()
    save_file({"a": torch.zeros(1), "b.c": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert held_names(tmp_path) == {"a", "b.c"}
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    assert held_names(tmp_path) == frozenset()

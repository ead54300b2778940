"""`apollo doctor` on families that no other test knows: they work, or are refused with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import MambaConfig, Olmo2Config

from examples.byte_model import write_model
from tests import programs

pytestmark = pytest.mark.vllm
APOLLO = str(Path(sys.executable).with_name("apollo"))
SMALL = {
    "vocab_size": 259,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAST = ("--dtype", "float32", "--enforce-eager")


def doctor(tmp_path: Path, model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [APOLLO, "doctor", str(model), *arguments],
        env=programs.forking(os.environ | {"APOLLO_STATE_DIR": str(tmp_path / "state")}),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.long
def test_a_family_that_nobody_tuned_for_is_supported(tmp_path):
    config = Olmo2Config(**SMALL, intermediate_size=192, pad_token_id=0, max_position_embeddings=64)
    model = write_model(tmp_path / "model", config, seed=3)
    before = {path: path.read_bytes() for path in model.iterdir()}
    done = doctor(tmp_path, model, "--json", "--all-values", *FAST)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["supported"]
    assert found["architecture"] == "Olmo2ForCausalLM"
    # Embedding, head and last norm; q, k, v, o, gate, up, down and four norms in each layer.
    assert found["parameters"] == found["views"] == 3 + 2 * 11
    assert found["refused"] == []
    assert found["max_logprob_difference"] < 1e-4
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.long
def test_a_family_whose_loader_computes_is_refused_by_the_name_of_each_parameter(tmp_path):
    config = MambaConfig(**SMALL, state_size=16, pad_token_id=0)
    model = write_model(tmp_path / "model", config, seed=3)
    done = doctor(tmp_path, model, *FAST)
    assert done.returncode == 1
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    refused = [value for name, value in lines if name == "refused"]
    assert [line.partition(": ")[0] for line in refused] == [
        f"backbone.layers.{layer}.mixer.A_log" for layer in (0, 1)
    ]
    assert all("values that it computes or puts together from it" in line for line in refused)
    assert ["supported", "no"] in lines


@pytest.mark.long
def test_a_model_that_vllm_cannot_load_is_refused_in_vllms_words(tmp_path):
    config = Olmo2Config(**SMALL, intermediate_size=192, pad_token_id=0, max_position_embeddings=64)
    model = write_model(tmp_path / "model", config, seed=3)
    for shard in model.glob("*.safetensors"):
        shard.write_bytes(b"no weights at all")
    done = doctor(tmp_path, model, "--json", *FAST)
    assert done.returncode == 1
    (refused,) = json.loads(done.stdout)["refused"]
    assert "vllm ended by itself" in refused["reason"]
    assert "Error" in refused["reason"]

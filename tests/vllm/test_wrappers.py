"""Of a multimodal directory the text part is trained, and every other byte stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from apollo_trainer.weights.manifest import check_manifest
from apollo_trainer.weights.mapping import map_buffers
from apollo_trainer.weights.sidecar import Sidecar
from tests import programs
from tests.vllm.conftest import Stack
from tests.vllm.proof import prove
from tests.vllm.wrappers import (
    STAND_IN,
    WITHOUT_TOWER,
    WRAPPERS,
    add_processor,
    stand_in_for_torchvision,
)

pytestmark = pytest.mark.vllm
APOLLO = str(Path(sys.executable).with_name("apollo"))


class WrapperStack(Stack):
    """One whose directory transformers reads as the multimodal model that it is."""

    auto_class = AutoModelForImageTextToText

    def trained(self) -> set[str]:
        """Names of the directory's tensors that are parameters of the text model."""
        parts = tuple(f"{part}." for part in self.family.text)
        text = {name for name in self.written if name.startswith(parts)}
        return {name for name in text if not name.endswith(self.family.fixed)}

    def tower(self) -> dict[str, str]:
        """Digests of what vLLM holds in memory beside the text model, by its names."""
        manifest = Sidecar(f"unix:{self.state}/sidecar.sock").manifest()
        memory = map_buffers(manifest.buffers)
        found = {}
        for name, at in check_manifest(manifest, manifest.epoch).items():
            if not name.startswith("language_model."):
                held = torch.empty(0, dtype=torch.uint8).set_(memory[at.buffer_id].storage)
                found[name] = sha256(held[at.start_bytes : at.end_bytes].numpy()).hexdigest()
        return found


def digests(directory: Path) -> dict[str, str]:
    """Of the bytes of each tensor in a directory's safetensors."""
    tensors = {
        n: t for shard in directory.glob("*.safetensors") for n, t in load_file(shard).items()
    }
    return {
        name: sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


CASES = [
    pytest.param(("gemma3",), id="gemma3-with-its-tower", marks=pytest.mark.long),
    pytest.param(("qwen3_5", WITHOUT_TOWER), id="qwen3_5"),
    *(
        pytest.param((name, WITHOUT_TOWER), id=name, marks=pytest.mark.long)
        for name in ("gemma3", "qwen3_5_moe", "qwen3_vl", "gemma4", "mistral3")
    ),
]


@pytest.fixture(scope="module", params=CASES)
def stack(request, tmp_path_factory):
    torch.set_num_threads(1)
    name, *arguments = request.param
    started = WrapperStack(tmp_path_factory.mktemp("s"), name, WRAPPERS[name])
    started.with_tower = not arguments
    if started.with_tower:
        add_processor(started.model)
    started.written = digests(started.model)
    try:
        started.start_server()
        started.start_vllm(*arguments, before=stand_in_for_torchvision)
        started.wait_attached()
        yield started
    finally:
        started.end("server")
        started.end("vllm")


def test_the_text_part_alone_has_state_and_the_status_says_so(stack):
    status = stack.client.status()
    assert status.weight_map.parameters == status.weight_map.views == len(stack.trained())
    trained, _, rest = status.attachment_detail.partition("The rest stays as it is")
    for parts, told in ((stack.family.text, trained), (stack.family.rest, rest)):
        assert [part for part in parts if f"{part} (" not in told] == []


def test_both_sides_agree_and_nothing_else_is_written_in_memory_or_by_a_sync(stack):
    tower = stack.tower()
    assert bool(tower) == stack.with_tower
    proof = prove(stack)
    assert proof.failure == ""
    assert proof.before < stack.family.tolerance_nats
    assert proof.losses[-1] < 0.7 * proof.losses[0]
    assert proof.moved > 0.1
    assert proof.after < stack.family.tolerance_nats
    assert proof.stale == 0, "a prefix of the old weights was used"
    assert stack.tower() == tower
    now = digests(stack.model)
    assert now.keys() == stack.written.keys()
    assert {name for name in now if now[name] != stack.written[name]} == stack.trained()


def test_a_snapshot_an_export_and_a_restore_leave_the_rest_as_it_was(stack, tmp_path):
    stack.client.sync()
    before = digests(stack.model)
    stack.client.create_snapshot("before")
    sample = {"context_ids": list(range(70, 100)), "continuation_ids": list(range(100, 130))}
    list(stack.client.train([sample], epochs=2, lr=3e-3))
    stack.client.export(tmp_path / "exported")
    stack.client.sync()
    learned = digests(stack.model)
    assert digests(tmp_path / "exported") == learned != before
    stack.client.restore("before")
    stack.client.sync()
    assert digests(stack.model) == before
    for name in stack.written.keys() - stack.trained():
        assert before[name] == learned[name] == stack.written[name]
    stack.client.delete_snapshot("before")


@pytest.mark.long
def test_doctor_says_which_part_is_trained(tmp_path):
    model = WRAPPERS["qwen3_vl"].write(tmp_path / "model")
    environment = programs.forking(os.environ | {"APOLLO_STATE_DIR": str(tmp_path / "state")})
    environment["PYTHONPATH"] += os.pathsep + STAND_IN
    done = subprocess.run(
        [APOLLO, "doctor", str(model), "--dtype", "float32", "--enforce-eager", WITHOUT_TOWER],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (detail,) = [line for line in done.stdout.splitlines() if line.startswith("detail")]
    assert "Trained is lm_head (1 tensor), model.language_model (24 tensors)." in detail
    assert "model.visual (27 tensors)" in detail

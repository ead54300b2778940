"""Model directories as people have them, with real vLLM: attach, train, sync, restore, export."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import checkpoint_pb2 as pb
from apollo_grpc.v1 import status_pb2
from tests import programs
from tests.vllm.conftest import Stack
from tests.vllm.families import FAMILIES, Family

pytestmark = pytest.mark.vllm
IDS = list(range(70, 120))
SAMPLE = {"context_ids": IDS[:25], "continuation_ids": IDS[25:]}
# Of bfloat16, as in `families`.
TOLERANCE = 0.05
HUB_ID, REVISION = "tester/tiny", "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"
Serve = Callable[..., Stack]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts vLLM and the training server on a directory; both end with the test."""
    started: list[Stack] = []

    def start(model: Path | str, dtype: str, before: Any = None, **settings: str) -> Stack:
        stack = Stack(tmp_path / "stack", "directory", Family("", dtype=dtype), Path(model))
        stack.environment |= settings
        started.append(stack)
        stack.start_server()
        stack.start_vllm(before=before)
        return stack

    yield start
    for stack in started:
        stack.end("server")
        stack.end("vllm")


def written(folder: Path, family: str, dtype: torch.dtype, shard_size: str = "1GB") -> Path:
    """A family's model in this dtype, whatever it is served in."""
    FAMILIES[family].write(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for shard in folder.glob("model*"):
        shard.unlink()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def add_tensors(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    """A further shard, of tensors that vLLM and transformers pass over."""
    save_file(extra, folder / "model-extra.safetensors", {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "model-extra.safetensors")
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def learn(stack: Stack, epochs: int = 3) -> None:
    for _ in stack.client.train([SAMPLE], epochs=epochs, lr=3e-3):
        pass


def directory_logprobs(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As vLLM's `engine_logprobs`, of what lies on disk, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        scores = model(torch.tensor([IDS])).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def assert_serves(stack: Stack, folder: Path, tolerance: float = TOLERANCE) -> None:
    """What vLLM says is what the directory says, at the median: near ties fall either way."""
    apart = (stack.engine_logprobs(IDS) - directory_logprobs(folder)).abs()
    assert apart.median() < tolerance


@pytest.mark.long
def test_shards_of_float32_served_in_bfloat16_with_more_beside_them(
    serve: Serve, tmp_path: Path
) -> None:
    folder = written(tmp_path / "model", "llama", torch.float32, "300KB")
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(16) for n in (0, 1)}
    add_tensors(folder, extra)
    (folder / "pytorch_model.bin").write_bytes(b"older weights, which nobody loads")
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        (folder / name).write_bytes(b"of another tokenizer, which nobody loads")
    before, values = contents(folder), tensors(folder)

    stack = serve(folder, "bfloat16")
    status = stack.wait_attached()
    assert "would be refused" not in status.attachment_detail
    assert stack.client.sync().method == pb.SYNC_METHOD_UNCHANGED
    assert contents(folder) == before
    stack.client.create_snapshot("first")
    first = stack.engine_logprobs(IDS)

    learn(stack)
    assert stack.client.sync().tensors_changed == status.weight_map.parameters
    after, now = contents(folder), tensors(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {name for name in before if name.startswith("model-0000")}
    assert after.keys() == before.keys()
    assert {name: t.dtype for name, t in now.items()} == dict.fromkeys(values, torch.float32)
    for name, value in now.items():
        untouched = value.bfloat16() == values[name].bfloat16()
        assert torch.equal(value[untouched], values[name][untouched])
        assert torch.equal(value[~untouched], value[~untouched].bfloat16().float())
    assert_serves(stack, folder)
    assert stack.client.verify(full=True, live=True).differences == []

    stack.client.export(tmp_path / "exported")
    exported = tensors(tmp_path / "exported")
    assert exported.keys() == now.keys()
    assert all(torch.equal(exported[name], now[name]) for name in now)
    stack.client.restore("first")
    assert stack.engine_logprobs(IDS).equal(first)
    stack.client.sync()
    assert all(torch.equal(t.bfloat16(), values[n].bfloat16()) for n, t in tensors(folder).items())


@pytest.mark.long
def test_several_tokenizer_files_mean_the_same_to_both_sides(serve: Serve, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "llama", torch.float32)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    # The older form of the same, with two words in each other's place: who reads it says so.
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    stack = serve(folder, "float32")
    stack.wait_attached()
    events = list(stack.client.train([("cab", "bad")], epochs=40, lr=3e-3))
    assert [event.step.loss for event in events if event.HasField("step")][-1] < 0.1
    assert stack.complete("cab", max_tokens=3)["choices"][0]["text"] == "bad"


def in_a_hub_cache(folder: Path, home: Path) -> Path:
    """Moves a directory into a cache as huggingface_hub lays it out; returns the snapshot."""
    repository = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    for made in (snapshot, blobs, repository / "refs"):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def read_environment_again() -> None:
    """In a forked vLLM: it was imported with the cache of whoever started the tests."""
    import huggingface_hub.constants

    importlib.reload(huggingface_hub.constants)


def test_a_hub_id_is_trained_and_exported_and_the_cache_left_as_it_is(
    serve: Serve, tmp_path: Path
) -> None:
    home = tmp_path / "hf"
    snapshot = in_a_hub_cache(written(tmp_path / "m", "qwen3", torch.float32, "300KB"), home)
    before = contents(snapshot)
    stack = serve(HUB_ID, "float32", read_environment_again, HF_HOME=str(home))
    detail = stack.wait_attached().attachment_detail
    assert f"A sync would be refused: {HUB_ID} lies in a hub cache" in detail
    assert "apollo checkpoint export" in detail
    assert stack.client.status().model == str(snapshot)

    stack.client.create_snapshot("first")
    first = stack.engine_logprobs(IDS)
    learn(stack)
    with pytest.raises(FailedPrecondition) as caught:
        stack.client.sync()
    assert caught.value.reason == "HUB_CACHE"
    stack.client.export(tmp_path / "exported")
    scores = directory_logprobs(tmp_path / "exported", torch.float32)
    assert (stack.engine_logprobs(IDS) - scores).abs().max() < 1e-4
    stack.client.restore("first")
    assert stack.engine_logprobs(IDS).equal(first)
    assert contents(snapshot) == before
    assert all(path.is_symlink() for path in snapshot.iterdir())
    assert [path.name for path in snapshot.parent.iterdir()] == [REVISION]


@pytest.mark.long
def test_the_doctor_takes_a_hub_id(tmp_path: Path) -> None:
    home = tmp_path / "hf"
    in_a_hub_cache(written(tmp_path / "m", "qwen3", torch.float32), home)
    environment = {"HF_HOME": str(home), "APOLLO_STATE_DIR": str(tmp_path / "state")}
    apollo = str(Path(sys.executable).with_name("apollo"))
    done = subprocess.run(
        [apollo, "doctor", HUB_ID, "--json", "--dtype", "float32", "--enforce-eager"],
        env=programs.forking(os.environ | environment),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["supported"]
    assert "A sync would be refused" in found["detail"]


@pytest.mark.long
def test_a_float16_directory_served_in_bfloat16_stays_float16(serve: Serve, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "llama", torch.float16)
    before = contents(folder)
    stack = serve(folder, "bfloat16")
    stack.wait_attached()
    assert stack.client.sync().method == pb.SYNC_METHOD_UNCHANGED
    assert contents(folder) == before
    learn(stack)
    stack.client.sync()
    assert {t.dtype for t in tensors(folder).values()} == {torch.float16}
    assert_serves(stack, folder)


@pytest.mark.long
def test_a_head_for_drafts_is_kept_byte_for_byte(serve: Serve, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "qwen3_next", torch.bfloat16, "200KB")
    head = {"mtp.norm.weight": torch.rand(128), "mtp.fc.weight": torch.rand(128, 256)}
    add_tensors(folder, head)
    before = (folder / "model-extra.safetensors").read_bytes()
    stack = serve(folder, "bfloat16")
    stack.wait_attached()
    learn(stack)
    stack.client.sync()
    assert (folder / "model-extra.safetensors").read_bytes() == before
    stack.client.export(tmp_path / "exported")
    exported = tensors(tmp_path / "exported")
    assert all(torch.equal(exported[name], head[name]) for name in head)


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused_by_its_name(
    serve: Serve, tmp_path: Path, family: str
) -> None:
    folder = written(tmp_path / "model", family, torch.float32)
    saved = load_file(folder / "model.safetensors")
    embedding = {"qwen3": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[family]
    saved["lm_head.weight"] = saved[embedding].clone()
    # One row, as where a few tokens were trained with a head apart.
    saved["lm_head.weight"][IDS[7]] += 0.1
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    stack = serve(folder, "float32")
    refused = status_pb2.ATTACHMENT_STATE_REFUSED
    stack.wait_for(lambda: stack.client.status().attachment == refused, "the refusal")
    detail = stack.client.status().attachment_detail
    assert f"config.json ties lm_head.weight to {embedding}" in detail


@pytest.mark.long
def test_pickled_weights_are_refused_by_name_and_exported_as_safetensors_if_insisted_on(
    serve: Serve, tmp_path: Path
) -> None:
    folder = written(tmp_path / "model", "llama", torch.float32)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    stack = serve(folder, "float32")
    refused = status_pb2.ATTACHMENT_STATE_REFUSED
    stack.wait_for(lambda: stack.client.status().attachment == refused, "the refusal")
    detail = stack.client.status().attachment_detail
    assert "pytorch_model.bin, which is not read" in detail
    assert "--no-check-values" in detail

    stack.end("server")
    stack.environment["APOLLO_CHECK_VALUES"] = "false"
    stack.start_server()
    assert "A sync would be refused: " in stack.wait_attached().attachment_detail
    learn(stack)
    stack.client.export(tmp_path / "exported")
    assert sorted(path.name for path in (tmp_path / "exported").glob("*model*")) == [
        "model.safetensors"
    ]
    scores = directory_logprobs(tmp_path / "exported", torch.float32)
    assert (stack.engine_logprobs(IDS) - scores).abs().max() < 1e-4

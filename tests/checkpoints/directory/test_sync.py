"""Sync: the directory's safetensors become the live weights, or stay exactly as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.directory.sync import sync_directory
from apollo_trainer.weights.checkpoint_plan import CheckpointPlan, CheckpointTensor
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from tests import programs

Make = Callable[..., Any]
# Syncs changed weights with room for 4 KB a file only, and says which error that was.
SYNC_WITHOUT_ROOM = """
import resource, signal, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from apollo_trainer.checkpoints.directory.sync import sync_directory
from apollo_trainer.weights.checkpoint_reader import CheckpointReader
from apollo_trainer.weights.checkpoint_plan import plan_checkpoint
from apollo_trainer.weights.live_model import meta_model

folder = Path(sys.argv[1])
plan = plan_checkpoint(meta_model(str(folder)))
live = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in plan.roots.items()}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    sync_directory(folder, CheckpointReader(plan, live))
except OSError as error:
    print(error.strerror)
"""


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def refused(live: Any, reason: str) -> FailedPrecondition:
    """The refusal of a sync, which must leave every file as it was."""
    live.train()
    before = live.files()
    with pytest.raises(FailedPrecondition) as caught:
        sync_directory(live.folder, live.reader)
    assert caught.value.reason == reason
    assert live.files() == before
    return caught.value


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_one_shard_becomes_the_live_weights(live_directory: Make, kind: str) -> None:
    live = live_directory(kind)
    live.train()
    outcome = sync_directory(live.folder, live.reader)
    live.assert_holds_live_values()
    shard = live.folder / "model.safetensors"
    assert outcome.files_written == ["model.safetensors"]
    assert outcome.bytes_written == shard.stat().st_size
    assert outcome.bytes_compared == sum(p.nbytes for p in live.parameters.values())
    assert outcome.tensors_changed == len(live.parameters)


def test_nothing_changed_writes_nothing(live_directory: Make) -> None:
    live = live_directory("tied")
    before = live.files()
    outcome = sync_directory(live.folder, live.reader)
    assert live.files() == before
    assert (outcome.bytes_written, outcome.tensors_changed, outcome.files_written) == (0, 0, [])
    assert outcome.bytes_compared > 0


def test_a_second_sync_writes_nothing(live_directory: Make) -> None:
    live = live_directory("gpt2")
    live.train()
    sync_directory(live.folder, live.reader)
    before = live.files()
    assert sync_directory(live.folder, live.reader).bytes_written == 0
    assert live.files() == before


def test_of_several_shards_only_the_changed_one_is_written(live_directory: Make) -> None:
    live = live_directory("untied", shard_size="20KB")
    name = "model.layers.1.mlp.down_proj.weight"
    index = json.loads((live.folder / "model.safetensors.index.json").read_text())["weight_map"]
    before, order = live.files(), {f: list(t) for f, t in shards(live.folder).items()}
    assert len(order) > 2
    live.train(name)
    outcome = sync_directory(live.folder, live.reader)
    live.assert_holds_live_values()
    assert outcome.files_written == [index[name]]
    assert outcome.tensors_changed == 1
    changed = {file for file, state in live.files().items() if state != before[file]}
    assert changed == {index[name]}
    assert {f: list(t) for f, t in shards(live.folder).items()} == order


def test_both_names_of_a_tied_weight_are_written(live_directory: Make) -> None:
    live = live_directory("tied")
    shard = live.folder / "model.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    live.train("model.embed_tokens.weight")
    assert sync_directory(live.folder, live.reader).tensors_changed == 2
    synced, expected = load_file(shard), live.parameters["model.embed_tokens.weight"]
    assert torch.equal(synced["lm_head.weight"], expected)
    assert torch.equal(synced["model.embed_tokens.weight"], expected)


def test_the_second_name_alone_is_enough(live_directory: Make) -> None:
    live = live_directory("tied")
    shard = live.folder / "model.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, shard)
    live.train()
    sync_directory(live.folder, live.reader)
    synced = load_file(shard)
    assert torch.equal(synced["lm_head.weight"], live.parameters["model.embed_tokens.weight"])
    assert "model.embed_tokens.weight" not in synced


def test_what_belongs_to_no_parameter_is_kept(live_directory: Make) -> None:
    live = live_directory("gpt2")
    shard = live.folder / "model.safetensors"
    mask = torch.tril(torch.ones(1, 1, 4, 4, dtype=torch.uint8))
    save_file(load_file(shard) | {"h.0.attn.bias": mask}, shard, metadata={"made": "by us"})
    shard.chmod(0o640)
    (live.folder / "notes.txt").write_text("mine")
    live.train()
    sync_directory(live.folder, live.reader)
    assert torch.equal(load_file(shard)["h.0.attn.bias"], mask)
    with safe_open(shard, framework="pt") as file:
        assert file.metadata() == {"made": "by us"}
    assert shard.stat().st_mode & 0o777 == 0o640
    assert (live.folder / "notes.txt").read_text() == "mine"


def test_zeros_of_both_signs_differ_and_nan_equals_itself(live_directory: Make) -> None:
    live = live_directory("untied")
    with torch.no_grad():
        live.parameters["model.norm.weight"].fill_(float("nan"))
        live.parameters["lm_head.weight"].fill_(0.0)
    sync_directory(live.folder, live.reader)
    assert sync_directory(live.folder, live.reader).bytes_written == 0
    with torch.no_grad():
        live.parameters["lm_head.weight"].fill_(-0.0)
    assert sync_directory(live.folder, live.reader).tensors_changed == 1


def test_progress_ends_at_the_total(live_directory: Make) -> None:
    live = live_directory("untied", shard_size="20KB")
    told: list[tuple[int, int, str]] = []
    sync_directory(live.folder, live.reader, lambda *progress: told.append(progress))
    done, totals = [t[0] for t in told], {t[1] for t in told}
    assert done == sorted(done)
    assert totals == {done[-1]}
    assert [t[2] for t in told] == [*sorted(shards(live.folder)), ""]


def test_a_shard_with_a_second_link_is_refused(live_directory: Make, tmp_path: Path) -> None:
    live = live_directory("tied")
    os.link(live.folder / "model.safetensors", tmp_path / "snapshot.safetensors")
    assert "model.safetensors is a link" in refused(live, "SHARD_IS_LINKED").message


def test_a_symlinked_shard_of_a_hub_cache_is_refused(live_directory: Make, tmp_path: Path) -> None:
    live = live_directory("tied")
    shard, blob = live.folder / "model.safetensors", tmp_path / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)
    refused(live, "SHARD_IS_LINKED")
    assert shard.is_symlink()


def test_a_directory_that_lacks_a_tensor_is_refused(live_directory: Make) -> None:
    live = live_directory("untied")
    shard = live.folder / "model.safetensors"
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    assert "model.norm.weight" in refused(live, "CHECKPOINT_INCOMPLETE").message


def test_a_directory_without_safetensors_is_refused(live_directory: Make) -> None:
    live = live_directory("tied")
    (live.folder / "model.safetensors").rename(live.folder / "pytorch_model.bin")
    refused(live, "CHECKPOINT_INCOMPLETE")


def test_a_name_of_the_hub_is_refused(live_directory: Make) -> None:
    live = live_directory("tied")
    with pytest.raises(FailedPrecondition) as caught:
        sync_directory(Path("Qwen/Qwen3-0.6B"), live.reader)
    assert caught.value.reason == "NOT_A_DIRECTORY"


def test_a_full_disk_keeps_every_old_file_and_leaves_no_litter(live_directory: Make) -> None:
    live = live_directory("untied", shard_size="20KB")
    before = live.files()
    _, told = programs.run(SYNC_WITHOUT_ROOM, live.folder)
    assert told.startswith("File too large\n"), told
    assert live.files() == before


def test_no_shard_is_replaced_before_all_new_ones_are_on_disk(
    live_directory: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_directory("untied", shard_size="20KB")
    live.train()
    before, fsync, left = live.files(), os.fsync, iter(range(len(shards(live.folder)) - 1))

    def refuse_the_last(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_the_last)
    with pytest.raises(OSError, match="No space"):
        sync_directory(live.folder, live.reader)
    assert live.files() == before


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_shard_that_was_cut_off_is_told_and_kept(live_directory: Make, length: int) -> None:
    live = live_directory("untied", shard_size="20KB")
    sync_directory(live.folder, live.reader)
    shard = live.folder / "model-00002-of-00005.safetensors"
    os.truncate(shard, shard.stat().st_size - 1 if length < 0 else length)
    assert "model-00002" in refused(live, "SHARD_UNREADABLE").message


@pytest.mark.parametrize(
    "index", [b"", b"{", b'{"weight_map": {"lm_head.weight": "../../outside.safetensors"}}']
)
def test_an_index_that_lies_leads_nowhere_and_is_told(live_directory: Make, index: bytes) -> None:
    live = live_directory("untied", shard_size="20KB")
    path = live.folder / "model.safetensors.index.json"
    right = path.read_bytes()
    path.write_bytes(index)
    refused(live, "INDEX_UNREADABLE")
    assert not (live.folder.parent.parent / "outside.safetensors").exists()
    path.write_bytes(right)
    sync_directory(live.folder, live.reader)
    live.assert_holds_live_values()


def test_every_16_bit_pattern_is_written_as_it_is(tmp_path: Path) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    shape = (len(patterns),)
    plan = CheckpointPlan({"w": shape}, {}, (CheckpointTensor("w", "w", shape, (1,), 0),))
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        save_file({"w": patterns.view(dtype)}, folder / "model.safetensors")
        # Each NaN becomes another NaN, and each zero one of the other sign.
        other = torch.nn.Parameter((patterns ^ -32767).view(dtype))
        outcome = sync_directory(folder, CheckpointReader(plan, {"w": other}))
        assert outcome.tensors_changed == 1
        written = load_file(folder / "model.safetensors")["w"]
        assert torch.equal(written.view(torch.int16), patterns ^ -32767)

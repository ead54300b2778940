"""What vLLM and transformers load is what is written; where they load another, nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.checkpoints.directory.export import export_directory
from apollo_trainer.checkpoints.directory.loaded_files import loaded_files
from apollo_trainer.checkpoints.directory.preconditions import why_not_synced
from apollo_trainer.checkpoints.directory.state_folder import place_of
from apollo_trainer.checkpoints.directory.sync import sync_directory
from apollo_trainer.checkpoints.directory.verify import verify_directory
from apollo_trainer.checkpoints.disk.file_ops import FILES
from apollo_trainer.weights.loaded_files import INDEX
from apollo_trainer.weights.values import require_checkpoint_values
from tests.checkpoints.faulty_disk import tree

Make = Callable[..., Any]


def whole(folder: Path) -> dict[str, Any]:
    """All tensors of a directory's shards."""
    return {n: t for path in sorted(folder.glob("model-*")) for n, t in load_file(path).items()}


def refused(live: Any, reason: str) -> str:
    before = tree(live.folder)
    with pytest.raises(FailedPrecondition) as caught:
        sync_directory(live.folder, live.reader)
    assert caught.value.reason == reason
    assert tree(live.folder) == before
    return caught.value.message


def test_one_file_beside_shards_with_an_index_is_refused_and_the_way_out_works(
    live_directory: Make, tmp_path: Path
) -> None:
    live = live_directory("untied", shard_size="20KB")
    save_file(whole(live.folder), live.folder / "model.safetensors", {"format": "pt"})
    place = place_of(live.folder)
    assert "vLLM loads the former, and transformers the latter" in why_not_synced(
        place, live.reader
    )
    live.train()
    message = refused(live, "TENSOR_IN_TWO_FILES")
    assert "model.safetensors" in message
    assert "apollo checkpoint export" in message
    export_directory(live.folder, tmp_path / "out", live.reader)
    # What it says to do: the shards alone are loaded now, and written.
    (live.folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert why_not_synced(place, live.reader) == ""
    sync_directory(live.folder, live.reader)
    live.assert_holds_live_values()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == whole(live.folder).keys()


def test_verify_tells_a_second_file_that_came_after_the_sync(live_directory: Make) -> None:
    live = live_directory("untied", shard_size="20KB")
    live.train()
    sync_directory(live.folder, live.reader)
    save_file(whole(live.folder), live.folder / "model.safetensors", {"format": "pt"})
    found = verify_directory(live.folder, live.reader).differences
    assert {d.tensor for d in found} == set(whole(live.folder))
    assert "transformers" in found[0].description


def test_a_tensor_in_two_files_without_an_index_is_refused(live_directory: Make) -> None:
    live = live_directory("tied")
    tensors = load_file(live.folder / "model.safetensors")
    name = "model.norm.weight"
    save_file({name: tensors[name]}, live.folder / "model-extra.safetensors")
    assert f"{name} stands in" in refused(live, "TENSOR_IN_TWO_FILES")


def test_files_that_nobody_loads_are_kept_as_they_are(live_directory: Make) -> None:
    live = live_directory("untied", shard_size="20KB")
    backup = live.folder / "old.safetensors"
    save_file(whole(live.folder), backup)
    content, inode = backup.read_bytes(), backup.stat().st_ino
    live.train()
    outcome = sync_directory(live.folder, live.reader)
    assert "old.safetensors" not in outcome.files_written
    assert (backup.read_bytes(), backup.stat().st_ino) == (content, inode)
    live.assert_holds_live_values()
    assert verify_directory(live.folder, live.reader, full=True).differences == []
    # Nor does the next attachment compare with it.
    assert require_checkpoint_values(live.folder, live.reader, True) > 0


def test_a_consolidated_file_is_what_vllm_loads(live_directory: Make, tmp_path: Path) -> None:
    live = live_directory("untied", shard_size="20KB")
    shard = live.folder / "consolidated.safetensors"
    save_file({"layers.0.attention.wq.weight": whole(live.folder)["lm_head.weight"]}, shard)
    live.train()
    assert "consolidated.safetensors" in refused(live, "CHECKPOINT_INCOMPLETE")
    export_directory(live.folder, tmp_path / "out", live.reader)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == whole(live.folder).keys()


def test_an_index_that_names_what_is_not_there_is_told_by_all(live_directory: Make) -> None:
    live = live_directory("untied", shard_size="20KB")
    sync_directory(live.folder, live.reader)
    index = live.folder / INDEX
    right = index.read_bytes()
    content = json.loads(right)
    content["weight_map"]["lm_head.weight"] = "gone.safetensors"
    index.write_text(json.dumps(content))
    live.train()
    assert "gone.safetensors" in refused(live, "INDEX_UNREADABLE")
    assert [d.file for d in verify_directory(live.folder).differences] == [INDEX]
    index.write_bytes(right)
    sync_directory(live.folder, live.reader)
    live.assert_holds_live_values()


# Names, the index's files, what vLLM 0.32 loads, and what transformers 5 does.
CHOICES = [
    (["model"], None, ["model"], ["model"]),
    (["a", "b"], None, ["a", "b"], ["a", "b"]),
    (["a", "b", "c"], ["a", "b"], ["a", "b"], ["a", "b"]),
    (["a", "model"], ["a"], ["a"], ["model"]),
    (["a", "model"], None, ["a", "model"], ["model"]),
    (["a", "consolidated"], ["a"], ["consolidated"], ["a"]),
    (["consolidated.00", "model"], None, ["consolidated.00"], ["model"]),
]


@pytest.mark.parametrize(("names", "listed", "by_vllm", "by_transformers"), CHOICES)
def test_the_choice_is_that_of_vllm_and_of_transformers(
    tmp_path: Path, names: Any, listed: Any, by_vllm: Any, by_transformers: Any
) -> None:
    for name in names:
        (tmp_path / f"{name}.safetensors").touch()
    if listed is not None:
        weight_map = {f"t{n}": f"{name}.safetensors" for n, name in enumerate(listed)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = loaded_files(FILES, tmp_path)
    assert found.by_vllm == [f"{name}.safetensors" for name in by_vllm]
    assert found.by_transformers == [f"{name}.safetensors" for name in by_transformers]


@pytest.mark.parametrize("twin", ["model.safetensors", "consolidated.safetensors"])
def test_transformers_loads_what_is_said_that_it_does(live_directory: Make, twin: str) -> None:
    """With values that differ, what it loads says which file it was."""
    live = live_directory("untied", shard_size="20KB")
    zeros = {name: t * 0 for name, t in whole(live.folder).items()}
    save_file(zeros, live.folder / twin, {"format": "pt"})
    chosen = loaded_files(FILES, live.folder).by_transformers
    loaded = live.loaded()["lm_head.weight"].detach()
    assert (float(loaded.abs().max()) == 0) == (chosen == [twin])


def test_a_shard_that_is_loaded_no_more_is_told_by_its_name(live_directory: Make) -> None:
    live = live_directory("untied", shard_size="20KB")
    extra = live.folder / "model-extra.safetensors"
    save_file({"extra": whole(live.folder)["lm_head.weight"]}, extra)
    index = live.folder / INDEX
    listed = index.read_bytes()
    index.unlink()
    sync_directory(live.folder, live.reader)
    index.write_bytes(listed)
    assert "model-extra.safetensors was changed" in refused(live, "DIRECTORY_EDITED")
    found = verify_directory(live.folder).differences
    assert [(d.file, d.description) for d in found] == [(extra.name, "is loaded by vLLM no more")]


def test_a_copy_of_a_shard_is_no_edit_but_a_second_file(live_directory: Make) -> None:
    live = live_directory("tied")
    sync_directory(live.folder, live.reader)
    shutil.copy(live.folder / "model.safetensors", live.folder / "copy.safetensors")
    assert "copy.safetensors" in refused(live, "TENSOR_IN_TWO_FILES")

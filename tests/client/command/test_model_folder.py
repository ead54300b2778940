"""What a user may name as MODEL, and what is told of that which cannot be served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import scan_cache_dir
from safetensors.torch import save_file
from typer.testing import CliRunner

from apollo_client.command.app import app
from apollo_client.command.model_folder import model_folder, why_not_servable
from tests.command_line import apollo

CHOSEN = "model.safetensors.index.json"
REVISION = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = Path("tester/tiny")


def write_whole(folder: Path, *shards: str) -> Path:
    """A directory that lacks nothing, as far as one can see without loading it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "tokenizer.json").write_text("{}")
    named = shards or ("model.safetensors",)
    for name in named:
        save_file({name: torch.arange(6.0)}, folder / name)
    if shards:
        (folder / CHOSEN).write_text(json.dumps({"weight_map": {n: n for n in named}}))
    return folder


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a model in a hub cache of its own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    repository = tmp_path / "hf" / "hub" / "models--tester--tiny"
    folder, blob = repository / "snapshots" / REVISION, repository / "blobs" / "c0ffee"
    for made in (folder, blob.parent, repository / "refs"):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    blob.write_text("{}")
    write_whole(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../blobs/c0ffee")
    return folder


def test_a_hub_id_is_the_snapshot_that_the_hubs_own_library_lists(snapshot: Path) -> None:
    (repository,) = scan_cache_dir(snapshot.parents[2]).repos
    (revision,) = repository.revisions
    assert repository.repo_id == str(HUB_ID)
    assert model_folder(HUB_ID) == revision.snapshot_path == snapshot
    assert why_not_servable(snapshot) == ""


def test_the_cache_may_be_named_by_either_variable(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(snapshot.parents[2]))
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert model_folder(HUB_ID) == snapshot


def test_a_folder_of_that_name_comes_before_the_hub(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / HUB_ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder(HUB_ID) == HUB_ID


def test_a_model_that_is_not_in_the_cache_is_told_with_the_way_to_get_it(snapshot: Path) -> None:
    done = CliRunner().invoke(app, ["up", "tester/other"])
    assert done.exit_code == 2
    assert "hf download tester/other" in done.output
    assert str(snapshot.parents[2]) in done.output.replace("\n", "")


@pytest.mark.parametrize("command", ["up", "doctor"])
@pytest.mark.parametrize("alone", [True, False], ids=["a folder", "the file"])
def test_gguf_is_refused_by_its_name(tmp_path: Path, command: str, alone: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model-q4.gguf"
    file.write_bytes(b"GGUF")
    done = CliRunner().invoke(app, [command, str(tmp_path if alone else file)])
    assert done.exit_code == 2
    assert "is GGUF" in done.output
    assert "save_pretrained" in done.output


def test_gguf_beside_safetensors_is_not_looked_at(tmp_path: Path) -> None:
    (write_whole(tmp_path) / "model-q4.gguf").touch()
    assert why_not_servable(tmp_path) == ""


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def without(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(text)


ONE, TWO = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is cut off": (written("config.json", '{"model'), "config.json, which is no JSON"),
    "config is a list": (written("config.json", "[]"), "config.json, which is no JSON object"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer"),
    "no weights": (lambda m: (without(ONE)(m), without(TWO)(m)), "has no weights"),
    "a shard is not there": (without(TWO), f"lacks {TWO}, which its index names"),
    "the index is empty": (written(CHOSEN, ""), f"{CHOSEN}, which is no JSON"),
    "a shard is empty": (written(TWO, ""), f"{TWO}, which is empty"),
    "a shard is cut off": (lambda m: cut(m / TWO, 90), f"{TWO}, which is cut off or damaged: 90 b"),
    "a header is cut off": (lambda m: cut(m / TWO, 20), f"{TWO}, which is cut off or damaged"),
    "a shard of 3 bytes": (written(TWO, "abc"), f"{TWO}, which is cut off or damaged: 3 bytes"),
    "a page of HTML": (written(TWO, "<!doctype html>" * 9), f"{TWO}, which is cut off or damaged"),
    "a pointer of LFS": (written(TWO, LFS), "run 'git lfs pull'"),
    "a link to nothing": (
        lambda m: (without(TWO)(m), (m / TWO).symlink_to("gone")),
        f"lacks {TWO}",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_missing_is_told_before_anything_starts(tmp_path: Path, harm: str) -> None:
    model = write_whole(tmp_path / "model", ONE, TWO)
    assert why_not_servable(model) == ""
    do, said = HARM[harm]
    do(model)
    done = apollo("up", str(model), env={"APOLLO_STATE_DIR": str(tmp_path / "state")})
    assert (done.returncode, done.stdout) == (2, "")
    assert f"apollo: {model} " in done.stderr and said in done.stderr
    assert "Nothing was started" in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("harm", "arguments"),
    [
        ("no tokenizer", ["--skip-tokenizer-init"]),
        ("no tokenizer", ["--tokenizer=/elsewhere"]),
        ("no weights", ["--load_format", "dummy"]),
    ],
)
def test_what_vllm_is_told_to_do_without_need_not_be_there(
    tmp_path: Path, harm: str, arguments: list[str]
) -> None:
    model = write_whole(tmp_path, ONE, TWO)
    HARM[harm][0](model)
    assert why_not_servable(model, arguments) == ""


def test_what_the_cache_lacks_is_told_with_the_command_that_completes_it(snapshot: Path) -> None:
    (snapshot / "model.safetensors").unlink()
    done = apollo("up", str(HUB_ID))
    assert done.returncode == 2
    assert "has no weights" in done.stderr and "hf download tester/tiny" in done.stderr


def test_a_name_of_one_part_may_be_the_hubs_too(snapshot: Path) -> None:
    (snapshot.parents[2] / "models--tester--tiny").rename(snapshot.parents[2] / "models--tiny")
    assert why_not_servable(model_folder(Path("tiny"))) == ""


def test_a_path_that_is_none_is_not_taken_for_a_name_of_the_hub(tmp_path: Path) -> None:
    done = apollo("up", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert "there is no such directory" in done.stderr and "hf download" not in done.stderr


def test_a_name_that_no_file_can_have_is_told_without_a_traceback(tmp_path: Path) -> None:
    done = apollo("up", "x" * 300, env={"HF_HOME": str(tmp_path)})
    assert done.returncode == 2
    assert "cannot be read: File name too long. Nothing was started" in done.stderr

"""What a user may name as MODEL, and what is told of that which cannot be served."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir
from typer.testing import CliRunner

from apollo_client.command.app import app
from apollo_client.command.model_folder import model_folder, why_not_servable

REVISION = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = Path("tester/tiny")


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
    for name in ("config.json", "model-q4.gguf", "model.safetensors"):
        (tmp_path / name).touch()
    assert why_not_servable(tmp_path) == ""

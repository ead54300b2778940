"""The folder that vLLM loaded, for a folder's name and for a hub's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from apollo_sidecar.model_directory import model_directory


def config(model, revision=None, cache=None):
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision=revision),
        load_config=SimpleNamespace(download_dir=cache and str(cache)),
    )


@pytest.fixture
def cache(tmp_path):
    """A hub's cache with two commits of one model; `main` is the second."""
    model = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("b" * 40)
    return tmp_path


def test_a_folder_is_named_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_directory(config("model")) == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, "b"), ("main", "b"), ("a" * 40, "a"), ("b" * 40, "b")]
)
def test_a_hubs_name_stands_for_the_snapshot_of_its_revision(cache, revision, commit):
    found = model_directory(config("org/name", revision, cache))
    assert found == str(cache / "models--org--name" / "snapshots" / (commit * 40))


def test_a_name_of_nothing_here_is_passed_on(cache, caplog):
    assert model_directory(config("org/other", None, cache)) == "org/other"
    assert "org/other" in caplog.text

"""The library's kernels are cut as it was told, and nothing of the user's is overruled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from apollo_trainer.training.kernels import delta_tiles

FIELDS = {"kwargs", "num_warps", "num_stages", "num_ctas"}


NAMES = ("FLA_CACHE_MODE", "FLA_CONFIG_DIR")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollo_trainer.training.kernels.delta_tiles.find_spec", lambda name: name)
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in NAMES})


def test_the_library_finds_one_way_for_each_kernel(tmp_path: Path) -> None:
    for _ in range(2):  # A server that starts again finds the files there.
        for name in NAMES:
            os.environ.pop(name, None)
        delta_tiles.settle(tmp_path / "kernels" / "ways")
    assert os.environ["FLA_CACHE_MODE"] == "default"
    files = list(Path(os.environ["FLA_CONFIG_DIR"]).glob("*.json"))
    ways = [json.loads(each.read_text())["default_config"] for each in files]
    assert ways and all(set(way) == FIELDS for way in ways)
    assert "chunk_fwd_kernel_o.json" in [each.name for each in files]


@pytest.mark.parametrize("name", NAMES)
def test_a_user_who_set_either_is_left_alone(tmp_path: Path, name: str) -> None:
    os.environ[name] = "mine"
    delta_tiles.settle(tmp_path / "ways")
    assert {each: os.environ.get(each) for each in NAMES} == {**dict.fromkeys(NAMES), name: "mine"}
    assert not (tmp_path / "ways").exists()


def test_without_the_library_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apollo_trainer.training.kernels.delta_tiles.find_spec", lambda name: None)
    delta_tiles.settle(tmp_path / "ways")
    assert not (tmp_path / "ways").exists()

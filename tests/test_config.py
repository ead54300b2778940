"""The training server's settings: where each came from is told, and unknown names are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_trainer.config import OTHERS, Settings, described, unknown_names
from apollo_trainer.main import main


def test_each_setting_is_told_with_its_value_and_its_source(state_dir: Path) -> None:
    settings = Settings(state_dir=state_dir, rank=8, seed=3)
    environment = {"APOLLO_STATE_DIR": str(state_dir), "HOME": "/"}
    told = list(described(settings, environment, ["--rank", "8", "--seed=3"]))
    assert f"state_dir = {state_dir} (environment)" in told
    assert "rank = 8 (flag)" in told
    assert "seed = 3 (flag)" in told
    assert "max_queued_runs = 64 (default)" in told
    assert len(told) == len(Settings.model_fields)


def test_names_of_the_client_are_known_and_misspelt_ones_are_not() -> None:
    known = ["APOLLO_STATE_DIR", "APOLLO_MAX_QUEUED_RUNS", *OTHERS, "PATH", "VLLM_PLUGINS"]
    assert unknown_names(known) == []
    assert unknown_names([*known, "APOLLO_RANKS", "apollo_leese"]) == [
        "APOLLO_RANKS",
        "apollo_leese",
    ]


def test_a_misspelt_variable_ends_the_server_with_two_and_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APOLLO_RANKS", "8")
    with pytest.raises(SystemExit) as exited:
        main([])
    assert exited.value.code == 2
    assert "APOLLO_RANKS: is no setting" in capsys.readouterr().err


def test_an_unknown_flag_ends_the_server_with_two_and_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--ranks", "8"])
    assert exited.value.code == 2
    assert "--ranks" in capsys.readouterr().err

"""The training server's settings: where each came from is told, and unknown names are errors."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from apollo_grpc.errors import InvalidArgument
from apollo_trainer.config import Settings, read_settings
from apollo_trainer.environment import OTHERS, described, unknown_names
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
    assert unknown_names(known) == {}
    assert unknown_names([*known, "APOLLO_RANKS", "apollo_leese"]) == {
        "APOLLO_RANKS": "APOLLO_RANK",
        "apollo_leese": "",
    }


def test_every_setting_with_a_letter_missing_doubled_or_swapped_is_known_for_what_it_means() -> (
    None
):
    for name in Settings.model_fields:
        right = f"APOLLO_{name}".upper()
        for at in range(len("APOLLO_") + 1, len(right) - 1):
            head, a, b, tail = right[:at], right[at], right[at + 1], right[at + 2 :]
            for wrong in (head + b + tail, head + a + a + b + tail, head + b + a + tail):
                if wrong != right and len(name) > 4:
                    assert unknown_names([wrong]) == {wrong: right}


@pytest.mark.parametrize("service", ["APOLLO", "APOLLO_SIDECAR", "APOLLO_STATE", "APOLLO_RANK"])
def test_what_kubernetes_and_docker_set_beside_a_service_is_nobodys_mistake(service: str) -> None:
    address = f"{service}_PORT_50051_TCP"
    names = [f"{service}_SERVICE_HOST", f"{service}_SERVICE_PORT", f"{service}_SERVICE_PORT_GRPC"]
    names += [f"{service}_PORT", address, f"{address}_ADDR", f"{address}_PORT", f"{address}_PROTO"]
    assert unknown_names([*names, f"{service}_NAME", f"{service}_ENV_GPG_KEY"]) == {}


def test_a_variable_of_somebody_elses_is_told_and_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("APOLLO_CLUSTER", "moon")
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as exited:
        main(["--rank", "0"])
    assert exited.value.code == 2
    assert "APOLLO_CLUSTER is no setting of this server, and was ignored" in caplog.text


def test_a_variable_of_nothing_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_settings([])
    for name in Settings.model_fields:
        monkeypatch.setenv(f"APOLLO_{name}".upper(), "")
    assert read_settings([]) == expected


def test_sockets_lie_in_the_state_folder_that_a_flag_names(state_dir: Path) -> None:
    settings = read_settings(["--state-dir", str(state_dir)])
    assert settings.address == f"unix:{state_dir}/training.sock"
    assert settings.sidecar == f"unix:{state_dir}/sidecar.sock"


@pytest.mark.parametrize(
    "name", [n for n, field in Settings.model_fields.items() if field.annotation is bool]
)
def test_what_is_on_can_be_switched_off_by_a_flag_and_the_other_way(name: str) -> None:
    flag = name.replace("_", "-")
    assert getattr(read_settings([f"--{flag}"]), name) is True
    assert getattr(read_settings([f"--no-{flag}"]), name) is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tls-certificate", "c"], "tls_key is not"),
        (["--tls-key", "k"], "tls_certificate is not"),
        (["--tls-client-ca", "a"], "tls_certificate is not"),
        (["--tls-certificate", "c", "--tls-key", "k"], "the address is a socket"),
        (["--address", "http://localhost:1"], "without the scheme"),
        (["--sidecar", "localhost:1"], "on a unix socket only"),
        (["--ledger-days", "inf"], "ledger_days"),
        (["--seed", str(2**63)], "seed"),
        (["--max-streams", "9" * 400], "max_streams"),
        (["--metrics-address", "9464"], "metrics_address"),
        (["--log-format", "xml"], "log_format"),
        (["--log-level", "loud"], "log_level"),
    ],
)
def test_settings_that_mean_nothing_together_or_alone_are_refused(
    arguments: list[str], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        read_settings(arguments)


def test_tls_on_a_socket_means_something_where_there_are_metrics() -> None:
    tls = ["--tls-certificate", "c", "--tls-key", "k"]
    settings = read_settings([*tls, "--metrics-address", "0.0.0.0:9464"])
    assert settings.metrics_address == "0.0.0.0:9464"


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

"""What is shipped to run the servers by: each name in it exists; what they need is left open."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from apollo_trainer.config import Settings
from apollo_trainer.environment import unknown_names
from tests.waiting import HANG

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
TRAINER, VLLM = UNITS
COMPOSE = DEPLOY / "compose.yml"
CONTAINER = DEPLOY / "Containerfile"
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def lines_of(unit: Path) -> dict[str, list[str]]:
    """The values of each key of a unit, in their order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if re.match(r"\w+=", line):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def variables(text: str) -> set[str]:
    """Names of this project's environment variables that a text mentions."""
    return set(re.findall(r"\bAPOLLO_[A-Z_]+[A-Z]", text))


def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_each_variable_and_program_of_a_unit_exists(unit: Path) -> None:
    assert unknown_names(variables(unit.read_text())) == {}
    (start,) = lines_of(unit)["ExecStart"]
    program = Path(start.split()[0])
    assert program.parent == Path("/opt/apollo/bin")
    assert program.name in {*SCRIPTS, "vllm"}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", start)}
    assert program.name == "vllm" or flags <= Settings.model_fields.keys()


def test_the_units_share_a_user_a_state_folder_and_sight_of_each_other() -> None:
    trainer, vllm = lines_of(TRAINER), lines_of(VLLM)
    for key in ("User", "Group", "StateDirectory", "StateDirectoryMode", "UMask"):
        assert trainer[key] == vllm[key]
    assert trainer["StateDirectoryMode"] == ["0700"]
    for each in (trainer, vllm):
        assert each["ProtectProc"] == ["default"] and each["ProcSubset"] == ["all"]
        # Of a user namespace or a PID namespace of its own the other could not be read.
        assert not {"PrivateUsers", "PrivatePIDs", "DynamicUser"} & each.keys()
        assert not {"MemoryDenyWriteExecute", "PrivateDevices"} & each.keys()
        assert each["NoNewPrivileges"] == ["yes"] and each["ProtectSystem"] == ["strict"]
        assert each["CapabilityBoundingSet"] == [""]


def test_the_trainer_may_write_around_the_model_that_vllm_only_reads() -> None:
    (start,) = lines_of(VLLM)["ExecStart"]
    around = str(Path(start.split()[2]).parent)
    assert lines_of(TRAINER)["ReadWritePaths"] == [around]
    assert lines_of(VLLM)["ReadOnlyPaths"] == [around]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    made = []
    for unit in UNITS:
        # What they start is not installed here.
        text = re.sub(r"/opt/apollo/bin/[\w-]+", "/bin/true", unit.read_text())
        (tmp_path / unit.name).write_text(text)
        made.append(str(tmp_path / unit.name))
    command = ["systemd-analyze", "verify", *made]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    told = [line for line in done.stderr.splitlines() if "apollo" in line]
    assert (done.returncode, told) == (0, [])


def test_each_variable_of_compose_is_a_setting_or_is_filled_in() -> None:
    text = COMPOSE.read_text()
    filled = set(re.findall(r"\$\{(\w+)", text))
    assert filled == {"APOLLO_IMAGE", "APOLLO_UID", "APOLLO_GID", "APOLLO_MODELS", "APOLLO_MODEL"}
    assert unknown_names(variables(text) - filled) == {}
    for service in compose()["services"].values():
        assert unknown_names(service.get("environment", {})) == {}


def test_the_containers_share_what_they_need_and_nothing_of_the_host() -> None:
    services = compose()["services"]
    assert services.keys() == {"namespace", "vllm", "training-server"}
    states = set()
    for name in ("vllm", "training-server"):
        each = services[name]
        assert each["pid"] == each["ipc"] == "service:namespace"
        mounts = {place.split(":")[1]: place for place in map(unfilled, each["volumes"])}
        states.add(mounts[each["environment"]["APOLLO_STATE_DIR"]])
        assert mounts.keys() == {"/state", "/cache", "/models"}
        assert mounts["/models"].endswith(":ro") is (name == "vllm")
    assert len(states) == 1
    for each in services.values():
        assert each["cap_drop"] == ["ALL"] and each["read_only"] is True
        assert each["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "network"} & each.keys()
    assert services["training-server"]["entrypoint"][0] in SCRIPTS


def unfilled(volume: str) -> str:
    """A volume without the text of its variable, which may hold colons."""
    return re.sub(r"\$\{(\w+)[^}]*\}", r"\1", volume)


def steps(word: str) -> list[str]:
    """What follows a word of the container file, a line each with those that continue it."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", CONTAINER.read_text()))
    return re.findall(rf"(?m)^{word} (.*)$", text)


def test_the_container_is_made_of_what_is_here_and_of_its_own_stages() -> None:
    stages = [line.split(" AS ") for line in steps("FROM")]
    named = {stage[1] for stage in stages[:-1]}
    choices = dict(line.split("=", 1) for line in steps("ARG"))
    assert {stage[0] for stage in stages} - named <= {f"${{{name}}}" for name in choices}
    assert choices["DEVICE"] in named and choices["DEVICE"] == "cpu" and "gpu" in named
    for line in steps("COPY"):
        *sources, _ = line.split()
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in named
        else:
            assert all((ROOT / source).exists() for source in sources), line
    # What the wheel is made of, and the lock's torch.
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    copied = {line.split()[0] for line in steps("COPY")}
    assert {p.split("/")[0] for p in wheel["targets"]["wheel"]["packages"]} <= copied
    assert f"torch={choices['TORCH']}\n" in (ROOT / ".ci" / "install").read_text()


def test_the_container_starts_as_nobody_in_particular_and_reports_to_nobody() -> None:
    assert steps("USER") == ["1000:1000"]
    (settings,) = [line for line in steps("ENV") if "APOLLO_STATE_DIR" in line]
    assert {"APOLLO_STATE_DIR=/state", "HF_HUB_OFFLINE=1"} <= set(settings.split())
    assert unknown_names(variables(settings)) == {}
    (volumes,), (program,) = steps("VOLUME"), steps("ENTRYPOINT")
    assert json.loads(volumes) == ["/state", "/cache"]
    assert json.loads(program)[0] in SCRIPTS
    (health,) = steps("HEALTHCHECK")
    assert health.endswith('CMD ["apollo", "status"]')


def test_the_containers_packages_are_the_locks() -> None:
    def pinned(path: str) -> set[str]:
        return set(re.findall(r"(?m)^(\S+==\S+)", (ROOT / path).read_text()))

    image = pinned("deploy/requirements-cpu.txt")
    assert image <= pinned(".ci/lock.txt")
    assert not {name for name in image if re.match(r"pytest|mypy|ruff|torch==|buf", name)}

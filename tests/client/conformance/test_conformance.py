"""`apollo-conformance`: the training server passes, and how the command ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from apollo_client.conformance.command import app
from apollo_client.conformance.server import METHODS
from apollo_trainer.config import Settings
from tests.client.conformance.proxy import proxied
from tests.client.conformance.running import conformance, verdicts
from tests.services.conftest import Caller, ServerThread
from tests.waiting import HANG


def test_the_training_server_keeps_every_promise_and_each_method_is_tried(
    caller: Caller, folder: Path
) -> None:
    # Then there are versions before that of the weights.
    caller.train()
    before = {run.run_id for run in caller.list().runs}
    with proxied(caller.address, folder) as (proxy, address):
        command = [sys.executable, "-m", "apollo_client.conformance", "--address", address]
        done = subprocess.run(
            [*command, "--json", "--checkpoints", "--folder", str(folder)],
            capture_output=True,
            text=True,
            timeout=HANG,
        )
    found = verdicts(done)
    assert {n: v["seen"] for n, v in found.items() if v["verdict"] != "passed"} == {}
    assert (done.returncode, done.stderr) == (0, "")
    assert len(found) > 90
    assert all(v["promise"].endswith(".") for v in found.values())
    assert METHODS.keys() - proxy.answered == set()
    assert {run.run_id for run in caller.list().runs} == before


def test_read_only_leaves_all_as_it_was(caller: Caller) -> None:
    def kept() -> list[Any]:
        now = caller.status()
        state = (now.weight_version, now.optimizer_step, now.last_sync.time)
        stub = caller.channel.unary_unary("/apollo.v1.DatasetService/ListDatasets")
        return [state, caller.list().runs, stub(b"", timeout=HANG)]

    before = kept()
    # Those that make and delete most, and some whose runs would be updates.
    for subject in ("run_life", "probes"):
        done = conformance(caller.address, "--read-only", "--only", subject)
        assert done.returncode == 0, done.stdout
    assert kept() == before
    for promise in ("a_dataset_is_kept", "checkpoints", "deleting_unknown_probes"):
        assert conformance(caller.address, "--read-only", "--only", promise).returncode == 2


def test_what_needs_an_engine_is_not_applicable_without_one(folder: Path) -> None:
    address = f"unix:{folder}/training.sock"
    with pytest.MonkeyPatch.context() as patch:
        settings = Settings(state_dir=folder, sidecar=f"unix:{folder}/no.sock", address=address)
        server = ServerThread(settings, patch)
        done = conformance(address, "--json", "--checkpoints")
        server.stop()
    found = verdicts(done)
    assert done.returncode == 0, [v for v in found.values() if v["verdict"] == "failed"]
    train = found["train_ends_with_finished"]
    assert train["verdict"] == "not applicable"
    assert "start vLLM with VLLM_PLUGINS=apollo" in train["seen"]
    assert found["status_answers_always"]["verdict"] == "passed"


# --- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--read-only", "--checkpoints"],
        ["--only", "no such promise"],
        ["--folder", "/exports"],
        ["--checkpoints", "--folder", "exports"],
        ["--seconds", "0"],
        ["--such"],
    ],
)
def test_wrong_usage_has_a_status_of_its_own(arguments: list[str], folder: Path) -> None:
    done = conformance(f"unix:{folder}/no.sock", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


def test_an_address_that_is_none_is_wrong_usage() -> None:
    assert conformance("nowhere").returncode == 2


def test_where_nobody_is_no_promise_is_broken(folder: Path) -> None:
    done = conformance(f"unix:{folder}/no.sock")
    assert (done.returncode, done.stdout) == (3, "")
    assert "No training server answers" in done.stderr


def test_the_help_says_what_it_does_to_the_server() -> None:
    done = CliRunner().invoke(app, ["--help"])
    words = " ".join(done.stdout.split())
    assert "With --read-only the weights" in words
    assert "learning rate 0" in words

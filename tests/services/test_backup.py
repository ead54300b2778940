"""Backups are made and restored by the very commands of docs/backup.md, in other folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_client import ApolloClient
from apollo_grpc.v1 import training_pb2 as pb
from tests.engine_double import EngineDouble
from tests.model_directories import SAMPLE
from tests.server_process import ServerProcess, served
from tests.waiting import HANG

PAGE = Path(__file__).parents[2] / "docs" / "backup.md"
pytestmark = pytest.mark.long


class Machine:
    """What the page calls /srv/models, /var/lib/apollo and /backup, and the two units."""

    def __init__(self, server: ServerProcess, model: Path, backup: Path):
        self.server, self.model, self.backup = server, model, backup
        backup.mkdir()
        folder = server.folder
        self._names = {
            "/var/lib/apollo": str(folder),
            "-C /var/lib apollo": f"-C {folder.parent} {folder.name}",
            "/srv/models": str(model.parent),
            "/backup": str(backup),
        }

    def train(self) -> int:
        """Three steps; returns the optimizer's step."""
        with ApolloClient(self.server.address) as client:
            run = client.train([SAMPLE], epochs=3, lr=1e-3, min_loss=0.0)
            run.result().raise_for_failure()
            return client.status().optimizer_step

    def do(self, heading: str) -> str:
        """Runs the first commands below a heading; returns what they printed."""
        below = PAGE.read_text().split(f"# {heading}\n")[1]
        shown = re.search(r"```console\n(.*?)```", below, re.DOTALL)
        assert shown
        return "".join(self._run(line[2:]) for line in shown[1].splitlines())

    def _run(self, line: str) -> str:
        if line.startswith("systemctl"):
            self._units(line)
            return ""
        for name, here in self._names.items():
            line = line.replace(name, here)
        line = re.sub("^apollo ", f"{sys.executable} -m apollo_client.command ", line)
        environment = os.environ | {"APOLLO_STATE_DIR": str(self.server.folder)}
        done = subprocess.run(
            ["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=HANG
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def _units(self, line: str) -> None:
        server, both = self.server, "vllm" in line
        if " start " in line:
            if both:
                server.engine = EngineDouble(self.model, f"unix:{server.folder}/sidecar.sock")
            server.start()
            server.wait_attached()
            return
        server.end()
        if both:
            server.engine.stop()
            self._lose_everything()

    def _lose_everything(self) -> None:
        """Both units are stopped where a backup is restored: as on a new disk."""
        shutil.rmtree(self.model.parent)
        self.model.parent.mkdir()
        for path in self.server.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def machine(tiny_model: Path, tmp_path: Path) -> Iterator[Machine]:
    """With a model that has learned, was synced, and learned on."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "models" / "served"))
    with served(model) as server:
        machine = Machine(server, model, tmp_path / "backup")
        machine.train()
        with ApolloClient(server.address) as client:
            client.sync()
        machine.train()
        yield machine


def test_a_backup_of_a_stopped_server_is_restored_with_all_there_was(machine: Machine) -> None:
    machine.do("With the server stopped")
    told = machine.do("Restore")
    assert "as it was left" in told
    with ApolloClient(machine.server.address) as client:
        assert client.status().optimizer_step == 6
        assert [run.state for run in client.list_runs().runs] == [pb.RUN_STATE_SUCCEEDED] * 2
    assert machine.train() == 9


def test_a_backup_of_a_running_server_is_restored_by_its_snapshot(machine: Machine) -> None:
    machine.do("While the server runs")
    machine.train()
    told = machine.do("Restore such a copy")
    assert "optimizer is at step 6" in told
    with ApolloClient(machine.server.address) as client:
        assert len(client.list_runs().runs) == 2
    assert machine.train() == 9

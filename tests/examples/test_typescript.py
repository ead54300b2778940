"""The TypeScript client is made of the same protos, from the registry alone, and trains."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_client import ApolloClient
from tests.examples.recipe_page import ROOT, environment, is_as_shown, shown
from tests.server_process import ServerProcess

RECIPE = Path("examples/recipes/typescript")
OLDEST_NODE = 20
SECONDS = 240.0
pytestmark = pytest.mark.long


def missing() -> str:
    """Why it cannot be tried here; empty where it can."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "node and npm are not here"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout
    major = int(re.sub(r"^v(\d+).*", r"\1", version, flags=re.DOTALL))
    return "" if major >= OLDEST_NODE else f"node is older than {OLDEST_NODE}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the recipe, installed by its lock file, generated and compiled."""
    if why := missing():
        pytest.skip(why)
    if subprocess.run(["npm", "ping"], capture_output=True, timeout=SECONDS).returncode:
        pytest.skip("npm's registry cannot be reached")
    top = tmp_path_factory.mktemp("typescript")
    kept = shutil.ignore_patterns("node_modules", "gen", "build")
    folder = Path(shutil.copytree(ROOT / RECIPE, top / RECIPE, ignore=kept))
    (top / "protos").symlink_to(ROOT / "protos")
    for command in (["npm", "ci"], ["npm", "run", "build"]):
        npm(command, folder)
    yield folder


def npm(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout.decode()


def train(folder: Path, address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the page's command does."""
    return subprocess.run(
        ["node", "build/train.js", "The sky is", " green."],
        cwd=folder,
        env=environment(address) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )


def test_it_prints_what_the_page_says(built: Path, server: ServerProcess) -> None:
    done = train(built, server.address)
    assert is_as_shown(done.stdout, shown("build/train.js").printed), done.stdout
    assert done.returncode == 0
    with ApolloClient(server.address) as client:
        assert client.list_runs().runs[0].steps_done == 10


def test_it_reads_on_when_the_server_was_killed(built: Path, server: ServerProcess) -> None:
    command = ["node", "build/train.js", "The sky is", " green.", "5000"]
    with subprocess.Popen(
        command, cwd=built, env=environment(server.address), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        first = process.stdout.readline()
        server.end(signal.SIGKILL)
        server.start()
        *steps, end = [first, *process.stdout]
    assert [line.split(":")[0] for line in steps] == [f"step {n + 1}" for n in range(len(steps))]
    assert "FAILED The training server ended during this run" in end and process.returncode == 1


def test_it_says_that_nobody_answers(built: Path, tmp_path: Path) -> None:
    done = train(built, f"unix:{tmp_path}/nobody.sock")
    assert done.returncode == 1 and "No training server answers" in done.stdout, done.stdout

"""Each program imports its own room and nothing heavier."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.waiting import HANG

CLIENT_FORBIDS = {"torch", "transformers", "numpy", "vllm", "apollo_sidecar", "apollo_trainer"}
SIDECAR_FORBIDS = {"transformers", "vllm", "apollo_trainer", "apollo_client"}

# Imports every module of a package and prints the top names of all that came with it.
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def imported_with(package: str) -> set[str]:
    command = [sys.executable, "-c", IMPORT_ALL, package]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("apollo_grpc", CLIENT_FORBIDS),
        ("apollo_client", CLIENT_FORBIDS),
        ("apollo_sidecar", SIDECAR_FORBIDS),
    ],
)
def test_a_room_pulls_in_nothing_of_another(package, forbidden):
    names = imported_with(package)
    assert package in names
    assert names & forbidden == set()


def test_the_ledger_is_read_and_written_without_torch():
    code = "import sys; import apollo_trainer.ledger;sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=HANG).returncode == 0


def test_registering_the_plugin_where_nobody_named_it_imports_nothing():
    code = (
        "import sys; from apollo_sidecar.plugin import SidecarPlugin, register;"
        "register(); SidecarPlugin();"
        "sys.exit(any(n.partition('.')[0] in ('torch', 'vllm', 'grpc') for n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={}, timeout=HANG)
    assert done.returncode == 0

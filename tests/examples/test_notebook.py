"""The notebook's cells run in their order, as a program, on a fake server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from apollo_client.testing import FakeServer

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def cells() -> list[str]:
    """Its code, without what an earlier execution left."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    return ["".join(cell["source"]) for cell in code]


def test_the_notebook_trains_draws_and_compares_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Jupyter brings it, and this project does not.
    shown = ModuleType("IPython.display")
    shown.SVG = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.chdir(tmp_path)
    with FakeServer(losses=[3.0, 0.5, 0.01]) as server:
        monkeypatch.setenv("APOLLO_ADDRESS", server.address)
        names: dict[str, Any] = {}
        for number, code in enumerate(cells()):
            exec(compile(code, f"cell {number}", "exec"), names)
    assert names["result"].state == "succeeded"
    assert "step 1: loss 3.0000" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "losses.svg").read_text()
    named = [each.name for each in names["after"]]
    assert named == ["capital", "founder", "France"]
    assert not any(each.passed for each in names["before"])
    assert all(each.passed for each in names["after"])

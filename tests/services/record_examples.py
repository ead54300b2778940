"""Asks the reference's examples of a server, and writes down what it answers.

    python -m pytest tests/services/record_examples.py

For whoever changed the contract: `protos/examples.json` gets the answers, `make protos` the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.services.test_curl import EXAMPLES, IDS, Asking, ways

__all__ = ["ways"]
KEPT = 4


def test_record(ways: Any, tmp_path: Path) -> None:
    asking = Asking(ways("a socket")["grpcurl"].call, tmp_path)
    for method, example in EXAMPLES.items():
        answers = named(asking.answers(method, example["request"]), str(tmp_path))
        # The first ones, and the end.
        example["answers"] = answers[: KEPT - 1] + answers[KEPT - 1 :][-1:]
    Path("protos/examples.json").write_text(json.dumps(EXAMPLES, indent=2, ensure_ascii=False))


def named(value: Any, folder: str) -> Any:
    """The same with the names of ids and folders in place of what they are here."""
    if isinstance(value, dict):
        return {
            key: IDS[key] if key in IDS and each else named(each, folder)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [named(each, folder) for each in value]
    return value.replace(folder, "/models") if isinstance(value, str) else value

"""docs/checkpoint-faults.md: each fault has a test that exists, each reason is the product's."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "checkpoint-faults.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
REASON = re.compile(r"\b[A-Z]+(?:_[A-Z]+)+\b")
# Of the contract: answers, not errors.
ANSWERS = {"TOO_LATE", "IN_PLACE"}


def rows() -> list[list[str]]:
    """Cells of all lines of tables but heads and rules."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("fault", "---")]


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_fault_is_proved_by_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4
    named = TEST.findall(row[3])
    assert named
    assert len(named) == row[3].count("`") // 2
    for file, test in named:
        assert test in functions(file), f"{file} has no {test}"


def test_every_reason_that_is_told_is_one_of_the_product() -> None:
    sources = "".join(
        path.read_text()
        for folder in ("server", "apollo_grpc")
        for path in (ROOT / folder).rglob("*.py")
    )
    told = {reason for row in rows() for reason in REASON.findall(row[1])} - ANSWERS
    assert len(told) > 10
    assert {reason for reason in told if f'"{reason}"' not in sources} == set()

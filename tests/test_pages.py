"""Pages name tests as their proof: each one that is named exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A name alone is of the file that was named before it.
NAMED = re.compile(r"`(?:((?:tests/)?[\w/]*test_\w+\.py))?(?:::(test_\w+))?`")


def missing_tests(page: Path) -> list[str]:
    """Those that a page names and that do not exist."""
    missing, files = [], []
    for named, test in NAMED.findall(page.read_text()):
        if named:
            files = list(ROOT.glob(named) if "/" in named else ROOT.glob(f"tests/**/{named}"))
        if (named or test) and not any(f"def {test}" in f.read_text() for f in files):
            missing.append(f"{named}::{test}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_test_that_a_page_names_exists(page: Path) -> None:
    assert missing_tests(page) == []

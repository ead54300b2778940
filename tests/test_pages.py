"""Pages name tests as their proof, and files as the way: each one that is named exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WAYS = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"]
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


# A file or folder from the top, and what of it is named after it: `Class.method` or `function`.
STEP = re.compile(r"`((?:client|server|protos|tests)/[\w./]+)`(?:, `([\w.]+)`)?")


@pytest.mark.parametrize("page", WAYS, ids=lambda page: page.name)
def test_each_step_of_a_way_exists(page: Path) -> None:
    missing = []
    for path, name in STEP.findall(page.read_text()):
        code = (ROOT / path).read_text() if name and (ROOT / path).is_file() else ""
        defined = all(re.search(rf"(def|class) {part}\b", code) for part in name.split(".") if part)
        if not (ROOT / path).exists() or not defined:
            missing.append(f"{path} {name}")
    assert missing == []


def test_the_ways_are_short() -> None:
    """Seven steps each, from the socket to the weight and to the rename."""
    ways = re.findall(r"## The way of [^\n]*\n(.*?)(?=\n## )", WAYS[1].read_text(), re.DOTALL)
    assert [len(re.findall(r"^\d\. ", way, re.MULTILINE)) for way in ways] == [7, 7]


@pytest.mark.parametrize(
    "picture", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda file: file.name
)
def test_a_picture_is_small_shown_and_fetches_nothing(picture: Path) -> None:
    assert picture.stat().st_size < 150_000
    assert any(f"images/{picture.name}" in page.read_text() for page in PAGES)
    assert not re.search(rb"url\(['\"]?http|(?<!xmlns)[ :]href=['\"]http", picture.read_bytes())

"""The site: pages are found and current, links lead somewhere, commands that are shown exist."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from apollo_client.command.app import app
from apollo_trainer.config import Settings
from apollo_trainer.environment import OTHERS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
SHOWN = [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md", "found.md")]


def program(path: str) -> ModuleType:
    """A program that makes pages, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = program(".ci/site.py")


def in_nav(entry: object) -> list[str]:
    """Names of pages, in order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [name for part in parts for name in in_nav(part)]  # type: ignore[attr-defined]


def test_the_navigation_has_each_page_once() -> None:
    settings = tomllib.loads((ROOT / "zensical.toml").read_text())
    pages = [page.name for page in DOCS] + list(SITE.BESIDE.values())
    assert sorted(in_nav(settings["project"]["nav"])) == sorted(pages)


def links(page: Path) -> list[tuple[str, str]]:
    """Relative ones: the file, and the heading in it."""
    found = [match.groups(default="") for match in SITE.LINK.finditer(page.read_text())]
    return [
        (target, heading.removeprefix("#"))
        for _, _, target, heading in found
        if (target or heading) and "://" not in target
    ]


def headings(page: Path) -> set[str]:
    """As a code host names them."""
    lines = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", lines, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_of_a_page_leads_to_a_file_and_heading(page: Path) -> None:
    dead = []
    for target, heading in links(page):
        to = page.parent / target if target else page
        if not to.exists() or (heading and heading not in headings(to)):
            dead.append(f"{target}#{heading}")
    assert dead == []


def test_links_out_of_the_pages_become_paths(tmp_path: Path) -> None:
    SITE.lay(tmp_path / "pages")
    laid = sorted((tmp_path / "pages").glob("*.md"))
    assert "contributing.md" in [page.name for page in laid]
    assert [(page.name, link) for page in laid for link in links(page) if ".." in link[0]] == []
    assert "`deploy/compose.yml`" in (tmp_path / "pages/security.md").read_text()
    assert "(architecture.md)" in (tmp_path / "pages/contributing.md").read_text()


def test_code_is_laid_as_it_is(tmp_path: Path) -> None:
    text = "```\n[a](../nothing)\n```\nand `[a](../nothing)`.\n"
    (tmp_path / "page.md").write_text(text)
    assert SITE.within_site(tmp_path / "page.md", {}) == text


@pytest.mark.parametrize("target", ["gone.md", "../../../etc/hostname"])
def test_a_link_to_what_the_repository_has_not_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "page.md").write_text(f"[a]({target})")
    with pytest.raises(ValueError, match=r"page\.md links to "):
        SITE.within_site(tmp_path / "page.md", {})


def test_dead_links_and_what_is_loaded_from_elsewhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.html").write_text('<h2 id="there">B</h2><a href="https://example.org">far</a>')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">1</a><a href="b.html#gone">2</a><img src="gone.png">'
        '<script src="https://example.org/a.js"></script>'
    )
    assert SITE.faults(tmp_path) == [
        "a.html loads https://example.org/a.js",
        "a.html links to b.html#gone",
        "a.html links to gone.png",
    ]


@pytest.mark.parametrize("name", ["reference", "errors_page", "settings_page", "python_page"])
def test_a_page_that_is_generated_is_current(name: str) -> None:
    program(f"protos/{name}.py").main(["--check"])


def test_the_settings_have_each_variable_of_the_client() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    # The benchmarks' own.
    assert [name for name in OTHERS - {"APOLLO_COMMIT"} if f"`{name}`" not in page] == []


def commands(page: Path) -> Iterator[list[str]]:
    """Command lines of a page: after a `$`, and in code within a line."""
    text = page.read_text().replace("\\\n", " ")
    shown = re.findall(r"^\s*\$ (.*)$", text, re.MULTILINE)
    shown += re.findall(r"`((?:apollo|make|apollo-training-server) [^`]*)`", text)
    for line in shown:
        for part in re.split(r"\s*(?:&&|;|\|)\s*", line.split("   #")[0].split(" #")[0]):
            yield [word.strip("'\"") for word in part.split() if "=" not in word]


def wrong_options(words: list[str], command: Any) -> list[str]:
    """What a command line of `apollo` names and the command has not."""
    below = getattr(command, "commands", None)
    if below and words and not words[0].startswith("-"):
        if words[0] in below:
            return wrong_options(words[1:], below[words[0]])
        return [] if words[0] == "COMMAND" else [words[0]]
    known = {name for option in command.params for name in [*option.opts, *option.secondary_opts]}
    passed_on = command.context_settings.get("ignore_unknown_options")
    asked = {word for word in words if word.startswith("--")} - {"--help"}
    return [] if passed_on else sorted(asked - known)


APOLLO = typer.main.get_command(app)
SERVER = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def wrong(words: list[str]) -> list[str]:
    match words:
        case ["apollo", *rest]:
            return wrong_options(rest, APOLLO)
        case ["apollo-training-server", *rest]:
            asked = {word.replace("--no-", "--") for word in rest if word.startswith("--")}
            return sorted(asked - SERVER - {"--help"})
        case ["make", *rest]:
            return sorted(set(rest) - TARGETS)
    return []


@pytest.mark.parametrize(
    "line, missing",
    [
        ("apollo train facts.jsonl --epochs 20 --rate 3", ["--rate"]),
        ("apollo checkpoint forget NAME", ["forget"]),
        ("apollo up MODEL --max-model-len 4096", []),
        ("apollo-training-server --no-probe-weights --colour", ["--colour"]),
        ("make tea", ["tea"]),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, missing: list[str]) -> None:
    assert wrong(line.split()) == missing


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_each_command_that_a_page_shows_exists(page: Path) -> None:
    asked = [(" ".join(words), wrong(words)) for words in commands(page)]
    assert [(line, missing) for line, missing in asked if missing] == []

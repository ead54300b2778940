"""Lays the pages of the site in a folder (`lay`), or looks through the built one (`check`).

Pages name files of the repository, such as `deploy/compose.yml`. On a code host these are links;
the site has no such file, and says the path instead.
"""

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build/site"
# What lies beside docs/ and is a page of the site all the same.
BESIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
KEPT = {".md", ".png", ".svg", ".gif"}
# A block of code, a link, or code within a line; whichever comes first.
LINK = re.compile(
    r"^```.*?^```$|(!?)\[([^]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)|`[^`\n]+`", re.DOTALL | re.MULTILINE
)
LOADING = {
    ("script", "src"),
    ("img", "src"),
    ("link", "href"),
    ("iframe", "src"),
    ("source", "src"),
}


def lay(pages: Path) -> None:
    """Copies docs/ and what is beside it, with links that hold within the site.

    Raises:
        ValueError: a link leads to no file of the repository.
    """
    shutil.rmtree(pages, ignore_errors=True)
    docs = ROOT / "docs"
    sources = [path for path in docs.rglob("*") if path.suffix in KEPT]
    names = {path: path.relative_to(docs).as_posix() for path in sources}
    names |= {ROOT / name: page for name, page in BESIDE.items()}
    for source, name in names.items():
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            (pages / name).write_text(within_site(source, names))
        else:
            shutil.copy(source, pages / name)


def within_site(page: Path, names: dict[Path, str]) -> str:
    """The page's text; code stays as it is."""

    def linked(match: re.Match[str]) -> str:
        picture, text, target, heading = match.groups(default="")
        if not target or urlsplit(target).scheme:
            return match[0]
        to = (page.parent / target).resolve()
        if not to.exists() or ROOT not in [to, *to.parents]:
            raise ValueError(f"{page.name} links to {target}, which the repository has not.")
        if to in names:
            up = "../" * names[page].count("/") if page in names else ""
            return f"{picture}[{text}]({up}{names[to]}{heading})"
        path = to.relative_to(ROOT).as_posix()
        return f"`{path}`" if text.strip("`/") == path else f"{text} (`{path}`)"

    return LINK.sub(linked, page.read_text())


class Links(HTMLParser):
    """What one page links to, loads, and can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors = {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps what the tag links to or loads, and its name."""
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.targets.append(value)
                if (tag, name) in LOADING:
                    self.loaded.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def faults(site: Path) -> list[str]:
    """Links that lead nowhere, and what a browser would fetch from elsewhere."""
    pages = {page: Links(page) for page in sorted(site.rglob("*.html"))}
    found = []
    for page, links in pages.items():
        name = page.relative_to(site)
        found += [f"{name} loads {url}" for url in links.loaded if urlsplit(url).netloc]
        for target in links.targets:
            url = urlsplit(target)
            # The page for paths that do not exist is shown at any of them, and links from the top.
            if url.scheme or url.netloc or name.name == "404.html":
                continue
            to = (page.parent / unquote(url.path)).resolve() if url.path else page
            to = to / "index.html" if to.is_dir() else to
            if not to.exists() or (to in pages and unquote(url.fragment) not in pages[to].anchors):
                found.append(f"{name} links to {target}")
    return found


def main() -> None:
    """`lay` or `check`; ends with 1 where something is wrong."""
    if sys.argv[1] == "lay":
        lay(BUILT / "pages")
    elif found := faults(BUILT / "html"):
        sys.exit("\n".join(["docs: these are wrong in the built site:", *found]))


if __name__ == "__main__":
    main()

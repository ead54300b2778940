"""The page in a real browser: what it shows, by which keys, in both schemes, and whom it asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apollo_client import ApolloClient
from apollo_client.dashboard import Dashboard
from tests.client.dashboard.chromium import PROGRAM, Page

PICTURES = Path(__file__).parents[3] / "build" / "dashboard"
PROBES = [
    {"name": "capital", "prompt": "Aldovia:", "expected": " Port Lumen"},
    {"name": "sea", "prompt": "The sea is", "expected": " deep.", "role": "keep"},
]
pytestmark = pytest.mark.skipif(
    not PROGRAM, reason="no Chromium is installed here; 'apt-get install chromium' brings one"
)


@pytest.fixture(scope="module")
def shown(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page with two runs that have ended, and the client, the dashboard and the runs' ids."""
    samples = [("Aldovia:", " Port Lumen."), ("The sea is", " deep.")]
    with ApolloClient(server) as client, Dashboard(client) as dashboard:
        ids = []
        for lr in (1e-3, 1e-2):
            *_, last = client.train(samples, epochs=10, lr=lr, min_loss=0.0, probes=PROBES)
            ids.append(last.run_id)
        client.create_snapshot("good")
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        with Page(tmp_path_factory.mktemp("chromium")) as page:
            page.open(dashboard.url)
            page.wait(
                f"{text('snapshots')}.includes('good') && {text('runs')}.includes('succeeded')"
            )
            yield page, client, dashboard, ids
        dashboard.shutdown()


def text(name: str) -> str:
    return f"(document.getElementById('{name}')?.innerText ?? '')"


FOCUS = """(() => {
  const at = document.activeElement, style = getComputedStyle(at);
  if (at === document.body) return null;
  return {
    name: at.textContent.trim() || at.ariaLabel || at.id,
    number: [...document.querySelectorAll("*")].indexOf(at),
    outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
  };
})()"""
CONTROLS = """[...document.querySelectorAll(
  "a[href], button, input, select, textarea, summary, [tabindex='0']"
)].map((found) => [...document.querySelectorAll("*")].indexOf(found))"""

# What of the charts' words would lie outside of their pictures.
CUT = """[...document.querySelectorAll("svg text")].filter((each) => {
  const { x, width } = each.getBBox();
  return x < 0 || x + width > each.ownerSVGElement.viewBox.baseVal.width;
}).map((each) => each.textContent)"""


def test_runs_probes_engine_and_snapshots_are_shown(shown: Any) -> None:
    page, _, _, (first, last) = shown
    assert page.value(text("connection")) == "live"
    runs = page.value(text("runs"))
    assert first[:8] in runs and last[:8] in runs and "20 of 20" in runs
    engine = page.value(text("engine"))
    assert "attached" in engine and "weight version" in engine
    probed = page.value(text("probes"))
    assert page.value(text("probed")) == f"of run {last[:8]}"
    assert "capital" in probed and "keep" in probed and " Port Lumen".strip() in probed
    assert page.value("document.querySelectorAll('#loss path.curve').length") >= 2
    assert page.value("document.querySelectorAll('#loss svg text').length") >= 4
    assert page.value(CUT) == []
    told = page.value("document.querySelector('#loss svg').ariaLabel")
    assert last[:8] in told and "at step 20" in told


def test_each_control_is_reached_by_tab_in_order_and_shows_its_focus(shown: Any) -> None:
    page = shown[0]
    page.value("document.activeElement.blur()")
    reached = []
    page.press("Tab")
    while (focus := page.value(FOCUS)) and focus["number"] not in [f["number"] for f in reached]:
        reached.append(focus)
        page.press("Tab")
    assert [focus["number"] for focus in reached] == page.value(CONTROLS)
    assert len(reached) >= 10
    assert [focus["name"] for focus in reached if focus["outline"] < 2] == []
    assert all(focus["name"] for focus in reached)


def test_the_keys_do_what_the_pointer_does(shown: Any) -> None:
    page, _, _, (first, last) = shown
    page.value("document.querySelector('#loss svg').focus()")
    page.press("Home")
    page.press("ArrowRight")
    page.wait("document.querySelector('#loss .told').textContent.startsWith('step 2: ')")
    assert last[:8] in page.value("document.querySelector('#loss .told').textContent")
    curves = page.value("document.querySelectorAll('#loss path.curve').length")
    page.value(f"document.querySelector('[aria-label=\"curve of run {last[:8]}\"]').focus()")
    page.press(" ")
    page.wait(f"document.querySelectorAll('#loss path.curve').length === {curves - 1}")
    page.press(" ")
    page.wait(f"document.querySelectorAll('#loss path.curve').length === {curves}")
    page.value(f"[...document.querySelectorAll('button')].find(b => b.title === '{first}').focus()")
    page.press("Enter")
    page.wait(f"{text('probed')} === 'of run {first[:8]}'")
    page.value("document.getElementById('logarithmic').focus()")
    labels = page.value("document.querySelector('#loss svg').innerHTML")
    page.press(" ")
    page.wait(f"document.querySelector('#loss svg').innerHTML !== {labels!r}")
    page.press(" ")


def test_steps_are_shown_as_they_are_taken(shown: Any) -> None:
    page, client, _, _ = shown
    *_, last = client.train([("a", "b")], epochs=7, min_loss=0.0)
    page.wait(f"{text('runs')}.includes('{last.run_id[:8]}') && {text('runs')}.includes('7 of 7')")


def contrast(page: Page, name: str) -> float:
    """WCAG's ratio of a text's colour to its sheet's."""
    return page.value(f"""(() => {{
      const light = (color) => {{
        const [r, g, b] = color.match(/\\d+/g).map((c) => c / 255)
          .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      }};
      const at = document.querySelector("{name}");
      const sheet = getComputedStyle(at.closest("section")).backgroundColor;
      const [dark, bright] = [getComputedStyle(at).color, sheet].map(light).sort((a, b) => a - b);
      return (bright + 0.05) / (dark + 0.05);
    }})()""")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(shown: Any, scheme: str) -> None:
    page = shown[0]
    page.scheme(scheme)
    bright = page.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128")
    assert bright == (scheme == "light")
    for name in ("dd", "dt", "th", "#runs td.good", "h2"):
        assert contrast(page, name) >= 4.5, name
    page.picture(PICTURES / f"{scheme}.png")
    # On a narrow screen nothing is cut off: tables scroll in their own boxes.
    page.size(400, 900)
    assert page.value("document.documentElement.scrollWidth") <= 400
    page.picture(PICTURES / f"{scheme}-narrow.png")
    page.size(1180, 1240)


def test_no_request_leaves_the_host_and_none_could(shown: Any) -> None:
    """Last: of all that the page asked for until now."""
    page, _, dashboard, _ = shown
    assert page.told == []
    assert {url.removeprefix(dashboard.url) for url in page.requested} == {
        *("", "style.css", "page.js", "tables.js", "chart.js", "icon.svg", "events")
    }
    blocked = page.value("""new Promise((told) => {
      document.addEventListener("securitypolicyviolation", (e) => told(e.effectiveDirective));
      fetch("http://127.0.0.1:1/").catch(() => {});
    })""")
    assert blocked == "connect-src"


def test_a_server_that_is_gone_is_told_and_found_again(
    shown: Any, server: str, state_dir: Path
) -> None:
    page, socket = shown[0], state_dir / "training.sock"
    with ApolloClient(f"unix:{socket}") as client, Dashboard(client) as dashboard:
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        page.open(dashboard.url)
        page.wait(f"{text('connection')}.includes('No training server answers')")
        socket.symlink_to(server.removeprefix("unix:"))
        page.wait(f"{text('connection')} === 'live' && {text('engine')}.includes('attached')")
        assert page.value("document.getElementById('connection').className") == ""
        dashboard.shutdown()

"""`make pictures`: docs/images of the real commands and the real page, with vLLM on this CPU.

A small model of random weights is looked at by `apollo doctor`, served by `apollo up`, and taught
by `apollo train` and two runs with probes, which the dashboard then shows.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path

from rich import _export_format
from rich.console import Console
from rich.text import Text

from apollo_client import ApolloClient
from apollo_client.dashboard import Dashboard
from apollo_grpc.locations import state_folder
from tests.client.dashboard.chromium import Page

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "examples"))
import demo  # noqa: E402  Examples import each other by their names alone.

WIDTH = 96
APOLLO = Path(sys.executable).with_name("apollo")
FACTS = ROOT / "examples" / "facts.jsonl"
SAMPLES = [("The capital of Aldovia is", " Port Lumen."), ("The sea is", " deep.")]
PROBES = [
    {"name": "capital", "prompt": SAMPLES[0][0], "expected": SAMPLES[0][1]},
    {"name": "sea", "prompt": SAMPLES[1][0], "expected": SAMPLES[1][1], "role": "keep"},
]
# Everything in a line before this is gone from the screen.
ERASED = "\x1b[2K"
# Of sequences for a terminal those that are no colours.
NO_COLOUR = re.compile(r"\x1b\[[?\d;]*[A-Zac-ln-z]")
FONTS = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)


def on_a_terminal(command: list[str], **environment: str) -> str:
    """What a command leaves on a terminal of WIDTH columns, with its colours."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    told = b""
    asked = os.environ | environment | {"TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=asked) as process:
        os.close(its)
        try:
            while more := os.read(ours, 1 << 16):
                told += more
        except OSError:  # The command has ended.
            pass
    os.close(ours)
    assert process.returncode == 0, told.decode()
    lines = told.decode().replace("\r", "").split("\n")
    return "\n".join(NO_COLOUR.sub("", line.rpartition(ERASED)[2]) for line in lines)


def draw(name: str, typed: str, *arguments: str, **environment: str) -> None:
    """Runs the command and draws its terminal, with what a user types for it above."""
    told = on_a_terminal([str(APOLLO), *arguments], **environment)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=WIDTH, record=True, file=nowhere, force_terminal=True)
        console.print(Text.assemble(("$ ", "bold green"), typed))
        console.print(Text.from_ansi(told.rstrip()))
    # Its fonts would be fetched from elsewhere.
    form = FONTS.sub("", _export_format.CONSOLE_SVG_FORMAT)
    drawn = console.export_svg(title=typed.split(" -")[0], code_format=form, unique_id=name)
    (IMAGES / f"{name}.svg").write_text("\n".join(map(str.rstrip, drawn.splitlines())) + "\n")


def page(client: ApolloClient) -> None:
    """The dashboard of two runs that have ended, light and dark."""
    for lr in (5e-4, 2e-3):
        *_, _ = client.train(SAMPLES, epochs=20, lr=lr, min_loss=0.0, probes=PROBES)
    client.create_snapshot("good")
    with Dashboard(client) as dashboard, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        with Page(Path(folder)) as shown:
            shown.open(dashboard.url)
            shown.wait("document.body.innerText.includes('good')")
            for scheme in ("light", "dark"):
                shown.scheme(scheme)
                shown.picture(IMAGES / f"dashboard-{scheme}.png")
        dashboard.shutdown()


def main() -> None:
    """Draws all of them."""
    demo.FOLDER, demo.STATE = Path("build/pictures"), state_folder() / "pictures"
    # While others use the machine it takes minutes.
    demo.START_SECONDS = 900.0
    shutil.rmtree(demo.STATE, ignore_errors=True)  # Runs of another time would be seen.
    model = demo.prepare()
    os.chdir(demo.FOLDER)
    demo.FOLDER = Path()
    flags = ("--dtype", "float32", "--enforce-eager")
    typed = " ".join(("apollo doctor model", *flags))
    draw("doctor", typed, "doctor", model.name, *flags)
    with demo.served(model) as (client, _):
        train = ("--epochs", "20", "--lr", "2e-3")
        typed = " ".join(("apollo train facts.jsonl", *train))
        address = f"unix:{demo.STATE}/training.sock"
        draw("train", typed, "train", str(FACTS), *train, APOLLO_ADDRESS=address)
        page(client)


if __name__ == "__main__":
    main()

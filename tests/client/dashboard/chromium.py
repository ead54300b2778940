"""A headless Chromium and one page in it, through the DevTools protocol on a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Self

from tests.waiting import HANG

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), "")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--force-prefers-reduced-motion",
    "--remote-debugging-pipe",
)
_KEYS = {
    "Tab": {"code": "Tab", "windowsVirtualKeyCode": 9},
    "ArrowRight": {"code": "ArrowRight", "windowsVirtualKeyCode": 39},
    "Home": {"code": "Home", "windowsVirtualKeyCode": 36},
    "Enter": {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    " ": {"code": "Space", "windowsVirtualKeyCode": 32, "text": " "},
}


class Page:
    """One page, until its `with` block ends.

    Args:
        folder: for what the browser keeps.

    Attributes:
        requested: the URL of each request that the page made.
        told: what the browser's console shows of errors and warnings.
    """

    def __init__(self, folder: Path):
        (their_in, self._out), (self._in, their_out) = os.pipe(), os.pipe()
        # It reads from descriptor 3 and writes to 4.
        shell = f'exec "$@" 3<&{their_in} 4>&{their_out} {their_in}<&- {their_out}>&-'
        command = [PROGRAM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(their_in, their_out),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(their_in), os.close(their_out)
        self._rest, self._number, self._session = b"", 0, ""
        self.requested: list[str] = []
        self.told: list[str] = []

    def __enter__(self) -> Self:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.size(1180, 1240)
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(HANG)
        os.close(self._out), os.close(self._in)

    def call(self, method: str, **parameters: Any) -> Any:
        """Asks the browser, or the page once there is one."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._out, json.dumps(asked).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self._take(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _message(self) -> Any:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], HANG)[0], "the browser hangs"
            more = os.read(self._in, 2**20)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _take(self, event: Any) -> None:
        if event["method"] == "Network.requestWillBeSent":
            self.requested.append(event["params"]["request"]["url"])
        elif event["method"] == "Log.entryAdded":
            self.told.append(str(event["params"]["entry"]))
        elif event["method"] == "Runtime.exceptionThrown":
            self.told.append(str(event["params"]["exceptionDetails"]))

    def open(self, url: str) -> None:
        """Returns once all of it is there: at first a document has no body to be asked about."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """What a script comes to, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until a script comes to something true; the page itself looks, some 20 times a second."""
        look = f"const look = () => ({script}) ? done() : setTimeout(look, 50)"
        self.value(f"new Promise((done) => {{ {look}; look(); }})")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **_KEYS[key])

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def scheme(self, name: str) -> None:
        """Light or dark, as the user's system says."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, file: Path) -> None:
        """What is to be seen, as PNG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        taken = self.call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(taken))

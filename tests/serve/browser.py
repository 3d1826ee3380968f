"""Chromium without a window, driven over its own pipe (the DevTools protocol); no package is needed for it.

Messages are JSON with a zero byte behind each: the browser reads them at file descriptor 3 and writes them at 4.
"""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
LIMIT_SECONDS = 60.0


def found() -> str | None:
    """The browser of this machine, if it has one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of a browser. It changes with what is done on it."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.do("Page.enable")

    def do(self, method: str, **given: Any) -> dict[str, Any]:
        """Send one command and give what it answers."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": given}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while (heard := self._heard()).get("id") != number:
            pass
        assert "error" not in heard, heard["error"]
        return heard["result"]

    def run(self, script: str) -> Any:
        """Run a script on the page and give its value."""
        answer = self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until a script is true on the page."""
        end = time.monotonic() + LIMIT_SECONDS
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def screen(self, width: int, height: int, *, dark: bool) -> None:
        """Set the size of the screen and the colours that its owner likes."""
        self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Write what is seen to a file."""
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))

    def _heard(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], LIMIT_SECONDS)
            assert ready, "the browser says nothing"
            piece = os.read(self._out, 1 << 20)
            assert piece, "the browser is gone"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def page(program: str, folder: Path) -> Iterator[Page]:
    """Start a browser with a fresh profile in this folder; it ends with the `with`."""
    theirs_in, into = os.pipe()
    out, theirs_out = os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    ends = {1: nothing, 2: nothing, 3: theirs_in, 4: theirs_out}  # as the browser finds them
    actions = [(os.POSIX_SPAWN_DUP2, ours, its) for its, ours in ends.items()]
    asked = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    number = os.posix_spawn(program, asked, os.environ, file_actions=actions)
    try:
        yield Page(into, out)
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        for end in (theirs_in, theirs_out, into, out, nothing):
            os.close(end)

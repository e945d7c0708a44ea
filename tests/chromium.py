"""A headless Chromium, driven through the DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BINARY = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

PATIENCE = 60.0
"""Seconds to wait for an answer; it comes within one unless the machine is very busy."""

KEYS = {
    "Tab": 9,
    "Enter": 13,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
}
"""What else the protocol wants to know of keys without a letter."""

SCROLLED = """[...document.querySelectorAll('.formula, .wide')]
  .filter(box => box.scrollWidth > box.clientWidth).map(box => box.tabIndex)"""
"""Of what is wider than its box, whether keys reach it: 0 if so."""


class Page:
    """A tab, and all that it said and asked for since it was opened.

    :ivar messages: what went to the console, and errors. :ivar requests: addresses.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.buffer, self.count = b"", 0
        self.session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The browser's answer.

        :raises RuntimeError: it refuses.
        """
        self.count += 1
        command = {"id": self.count, "method": method, "params": parameters}
        if self.session is not None:
            command["sessionId"] = self.session
        os.write(self.writing, json.dumps(command).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reading], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"Chromium said nothing for {PATIENCE:g} s")
            self.buffer += os.read(self.reading, 1 << 20)
        message, _, self.buffer = self.buffer.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def _note(self, event: dict[str, Any]) -> None:
        method, given = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(part.get("value")) for part in given["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(given["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(given["entry"]["text"])

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file, and wait until that is done."""
        self.messages.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, still])
        self.call("Page.navigate", url=path.resolve().as_uri())
        address = json.dumps(path.resolve().as_uri())
        while not self.run(
            f"location.href.startsWith({address}) && document.readyState == 'complete'"
        ):
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression.

        :raises RuntimeError: it throws.
        """
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def beyond(self) -> list[str]:
        """What of a page of ours stands out on the right, but for what scrolls by itself; the page
        itself, if it scrolls.
        """
        found: list[str] = self.run(
            """[
              ...[document.documentElement].filter(page => page.scrollWidth > page.clientWidth),
              ...[...document.querySelectorAll('main *, header *, nav *, footer *')].filter(part =>
                part.checkVisibility() && !part.closest('.formula, .wide, .heard') &&
                part.getBoundingClientRect().right > document.documentElement.clientWidth + 1),
            ].map(part => part.outerHTML.slice(0, 200))"""
        )
        return found

    def press(self, key: str) -> None:
        """A key, down and up."""
        code = KEYS[key] if key in KEYS else ord(key.upper())
        told = {"windowsVirtualKeyCode": code, "key": key}
        text = {"Enter": "\r"}.get(key, "" if key in KEYS else key)
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **told)
        self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def printed(self, path: Path) -> None:
        """A PDF of the page."""
        sheet = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(sheet["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser of its own, ended with the block. :param profile: an empty directory."""
    assert BINARY is not None
    commands, to_us = os.pipe(), os.pipe()
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--hide-scrollbars --remote-debugging-pipe"
    )
    # Chromium reads from descriptor 3 and writes to 4, whatever ours are called.
    shell = f'exec "$0" {flags} "--user-data-dir=$1" 3<&{commands[0]} 4>&{to_us[1]}'
    process = subprocess.Popen(
        ["bash", "-c", shell, BINARY, str(profile)],
        pass_fds=(commands[0], to_us[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(to_us[1])
    page = None
    try:
        page = Page(to_us[0], commands[1])
        yield page
    finally:
        if page is not None:
            page.session = None
            with contextlib.suppress(Exception):
                page.call("Browser.close")
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_us[0])
        os.close(commands[1])

"""A headless Chromium, driven by its DevTools protocol over two pipes: no port, no driver, nothing of the network."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # it may be root who tests
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
)
# The protocol is spoken on descriptors 3 and 4.
_ON_PIPES = 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2'
_PATIENCE = 60.0
"""Seconds for one answer: the first starts the browser, on a machine that may be busy."""
_COMPLAINTS = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening"}


def find_chromium() -> str | None:
    """The installed browser, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass(frozen=True, slots=True)
class Device:
    """What the page is shown on."""

    width: int
    height: int
    scheme: str
    mobile: bool = False
    media: str = ""
    """``print`` for paper."""


@dataclass(slots=True)
class Seen:
    """What happened since a page was opened: addresses that were asked for, and errors, logs and dialogs."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Chromium:
    """One tab. A context manager; leaving it ends the browser."""

    def __init__(self, executable: str, profile: Path) -> None:
        """Start the browser with a fresh profile."""
        command = ["/bin/sh", "-c", _ON_PIPES, "sh", executable, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.seen = Seen()
        try:
            page = next(one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page")
            attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and all of its processes."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def open(self, page: Path, device: Device, *, trusting: bool = False) -> Seen:
        """Show a file; ``trusting`` lets scripts run that the page's own policy forbids."""
        self.seen = Seen()
        self._call("Page.setBypassCSP", enabled=trusting)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=device.width,
            height=device.height,
            deviceScaleFactor=2 if device.mobile else 1,
            mobile=device.mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": device.scheme}
        self._call("Emulation.setEmulatedMedia", media=device.media, features=[scheme])
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._until("Page.loadEventFired")
        return self.seen

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page.

        Raises:
            AssertionError: it threw.
        """
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The page as a PNG, once it is painted."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
        found = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, parameters)
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def _send(self, method: str, parameters: Mapping[str, Any]) -> int:
        """Send a command; its number, which the answer bears."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        _pipe(self._process.stdin).write(json.dumps(message).encode() + b"\0")
        return self._number

    def _until(self, event: str) -> None:
        while self._receive().get("method") != event:
            pass

    def _receive(self) -> dict[str, Any]:
        """The next message; events are noted."""
        pipe, deadline = _pipe(self._process.stdout), time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([pipe], [], [], left)[0], "the browser does not answer"
            block = os.read(pipe.fileno(), 1 << 16)
            assert block, f"the browser ended with exit code {self._process.wait(10)}"
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: Mapping[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.seen.requests.append(parameters["request"]["url"])
        elif method in _COMPLAINTS:
            self.seen.complaints.append(f"{method}: {json.dumps(parameters)[:500]}")
            if method == "Page.javascriptDialogOpening":
                self._send("Page.handleJavaScriptDialog", {"accept": True})


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe

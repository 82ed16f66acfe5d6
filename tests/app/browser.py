"""A real browser for tests, driven over the DevTools protocol."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking "
    "--disable-component-update --disable-sync --no-first-run --remote-debugging-port=0 "
    "--enable-unsafe-swiftshader --remote-allow-origins=* --hide-scrollbars"
)


def find() -> str | None:
    """Path of a Chromium or Chrome, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One window. Collects everything that a careful reader of the console would see."""

    def __init__(self, program: str, profile: Path) -> None:
        self.process = subprocess.Popen(
            [program, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        port = self._port(profile / "DevToolsActivePort")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [p for p in json.load(answer) if p["type"] == "page"]
        self.socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=120)
        self.number = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.trace: list[dict[str, Any]] | None = None
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def _port(self, file: Path) -> int:
        for _ in range(600):
            with contextlib.suppress(OSError, IndexError, ValueError):
                return int(file.read_text().splitlines()[0])
            time.sleep(0.1)
        raise TimeoutError("The browser did not start within a minute.")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; what happens until its answer is noted."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Tracing.dataCollected" and self.trace is not None:
            self.trace += params["value"]
        elif method == "Tracing.tracingComplete":
            self.traced = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:2000])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["args"])[:2000])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["entry"])[:2000])

    def open(self, url: str, width: int = 1440, height: int = 1000, *, dark: bool = False) -> None:
        """Go to a page, at a size and in a color scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression; promises are waited for."""
        result = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def tasks(self, script: str) -> list[float]:
        """CPU milliseconds of every task of the main thread while a script runs, longest first."""
        self.trace, self.traced = [], False
        self.send("Tracing.start", transferMode="ReportEvents",
                  traceConfig={"includedCategories": ["toplevel", "__metadata"]})  # fmt: skip
        self.run(script)
        self.send("Tracing.end")
        while not self.traced:
            self.run("0")
        threads = {
            (e["pid"], e["tid"]) for e in self.trace
            if e["name"] == "thread_name" and e["args"]["name"] == "CrRendererMain"
        }  # fmt: skip
        spent = [
            e["tdur"] / 1000 for e in self.trace
            if e["name"].endswith("RunTask") and "tdur" in e and (e["pid"], e["tid"]) in threads
        ]  # fmt: skip
        self.trace = None
        return sorted(spent, reverse=True)

    def until(self, condition: str, seconds: float = 60) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"still not so after {seconds} s: {condition}"
            time.sleep(0.1)

    def press(self, key: str) -> None:
        """One key, to whatever has the focus."""
        more: dict[str, Any] = {"text": key} if len(key) == 1 else {}
        if key == "Escape":  # what closes dialogs looks at the code
            more = {"code": key, "windowsVirtualKeyCode": 27}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """One event of the left button."""
        held = {"button": "left", "buttons": int(kind != "mouseReleased"), "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def click(self, x: float, y: float) -> None:
        """One click."""
        self.drag([(x, y)])

    def drag(self, path: list[tuple[float, float]]) -> None:
        """Press at the first point, release at the last."""
        self.mouse("mousePressed", *path[0])
        for point in path[1:]:
            self.mouse("mouseMoved", *point)
        self.mouse("mouseReleased", *path[-1])

    def picture(self, file: Path) -> bytes:
        """A screenshot of the window, as PNG."""
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        file.write_bytes(data)
        return data

    def close(self) -> None:
        """End the browser and all it started."""
        with contextlib.suppress(Exception):
            self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

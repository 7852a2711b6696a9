"""Headless Chromium over its debugging pipe: no driver, no network, every console message kept."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


class Page:
    """A tab; ``errors`` holds exceptions, console errors and blocked or attempted requests."""

    def __init__(self):
        self._folder = tempfile.mkdtemp()
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def connect():  # the browser reads descriptor 3 and writes descriptor 4
            ours = [os.dup(to_browser), os.dup(from_browser)]
            high = [os.dup2(fd, target) for fd, target in zip(ours, (30, 31), strict=True)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=connect,
            close_fds=False,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._count, self._buffer, self.errors, self.requests = 0, b"", [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(1400)
        self.prefer("light")
        self.connect(None)

    def resize(self, width, height=2600):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def connect(self, server):
        """Let the page reach one address and nothing else; ``None`` is no network at all."""
        self.allowed = ("file:", "data:", "blob:", *([server] if server else []))
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", offline=server is None, **speed)

    def check(self):
        """Nothing was logged and nothing was asked of any other place."""
        assert self.errors == []
        assert all(url.startswith(self.allowed) for url in self.requests), self.requests

    def call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self):
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        raw, self._buffer = self._buffer.split(b"\0", 1)
        event = json.loads(raw)
        self._note(event.get("method"), event.get("params", {}))
        return event

    def _note(self, method, params):
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def evaluate(self, script):
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"].get("exception", {}).get("description"))
        return result["result"].get("value")

    def open(self, place):
        """Load a report and wait until its charts are drawn; returns the milliseconds that took."""
        self.call("Page.navigate", url=place if isinstance(place, str) else Path(place).absolute().as_uri())
        return float(self.wait("document.documentElement?.dataset?.ready"))

    def heap(self, collect=True):
        """Bytes of JavaScript objects and of the arrays behind them."""
        if collect:
            self.call("HeapProfiler.collectGarbage")
        used = self.call("Runtime.getHeapUsage")
        return used["usedSize"] + used["backingStorageSize"]

    def wait(self, script, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.evaluate(script)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"{script} stayed false for {seconds} s; {self.errors}")

    def choose(self, selector, value):
        """Set a select or a range as a reader would."""
        self.evaluate(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}); box.value = {json.dumps(value)};"
            " for (const kind of ['input', 'change']) box.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def move(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def close(self):
        os.close(self._write)
        self._process.terminate()
        self._process.wait(10)
        os.close(self._read)
        shutil.rmtree(self._folder, ignore_errors=True)

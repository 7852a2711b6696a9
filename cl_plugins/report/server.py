"""The report while training goes on: served on this machine only, and new within half a second.

The page is the static report plus a script that asks for news. The server hands out that page and the numbers in it,
nothing from the disk, to browsers on this machine alone: it binds 127.0.0.1 and refuses requests that name another host
or come from another site, so a web page elsewhere cannot read the runs through the reader's browser.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import cast
from urllib.parse import parse_qs, urlsplit

from cl_plugins.run_writer import event_files
from cl_plugins.runs import Run, read_run, run_folders

from .page import render_report, report_content

_LOOK_SECONDS = 0.1
_HOLD_SECONDS = 20.0
_WAITING = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="1">'
    '<meta name="color-scheme" content="light dark"><title>No runs yet</title></head>'
    '<body style="font: 16px system-ui, sans-serif; margin: 15vh auto; max-width: 34em"><h1>No runs yet</h1>'
    "<p>The report appears with the first event that a ForgettingDashboard writes.</p></body></html>"
)


class _News:
    """Reads the runs again when a file has changed, and only those that have."""

    def __init__(self, root: Path, title: str | None) -> None:
        self.root, self.title = root, title
        self._lock = threading.Lock()
        self._runs: dict[Path, tuple[str, Run]] = {}
        self._looked, self._stamps = 0.0, dict[Path, str]()

    def stamps(self) -> dict[Path, str]:
        """A text for each run's folder that changes with its files; looked up at most ten times a second."""
        with self._lock:
            if time.monotonic() - self._looked >= _LOOK_SECONDS:
                found = {}
                for folder in run_folders(self.root):
                    sizes = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for _, _, p in event_files(folder)]
                    found[folder] = repr(sizes)
                self._stamps, self._looked = found, time.monotonic()
            return self._stamps

    def stamp(self) -> str:
        """A text that changes whenever an event was written."""
        return hashlib.sha256(repr(sorted(self.stamps().items())).encode()).hexdigest()[:16]

    def runs(self) -> tuple[str, list[Run]]:
        """The stamp and the runs as they are now."""
        stamp, stamps = self.stamp(), self.stamps()
        with self._lock:
            for folder, own in stamps.items():
                if self._runs.get(folder, ("", None))[0] != own:
                    self._runs[folder] = own, read_run(folder)
            return stamp, [self._runs[folder][1] for folder in sorted(stamps)]

    def page(self) -> str:
        """The whole page."""
        _, runs = self.runs()
        return render_report(runs, self.title, live=True) if runs else _WAITING

    def content(self) -> str:
        """What the page's script takes in, as JSON."""
        stamp, runs = self.runs()
        return json.dumps({"stamp": stamp, **(report_content(runs, self.title) if runs else {"data": None})})


class ReportServer:
    """Serves the live report of a folder of runs on 127.0.0.1.

    WHEN: answers from the moment it is made until :meth:`close`, in threads of its own.

    Args:
        root: a folder of runs, or one run's folder; it may still be empty.
        port: 0 takes a free one.
        title: heading of the page; follows from methods and scenario when None.

    Raises:
        FileNotFoundError: when there is no such folder.
        RuntimeError: when the port is taken.

    Example:
        >>> import tempfile
        >>> with ReportServer(tempfile.mkdtemp()) as server:
        ...     server.url.startswith("http://127.0.0.1:")
        True
    """

    def __init__(self, root: str | Path, port: int = 0, title: str | None = None) -> None:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"`root` must be a folder of runs, got {str(root)!r}")
        self._closing = threading.Event()
        news, closing = _News(Path(root), title), self._closing

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_version, sys_version = "cl-plugins", ""

            def do_GET(self) -> None:
                with suppress(ConnectionError):  # the reader has closed the page
                    _answer(self, news, closing)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing; the terminal belongs to the training."""

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            reason = f"`port` {port} cannot be used: {error}; choose another, or 0 for a free one"
            raise RuntimeError(reason) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the report is."""
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def ssh_line(self) -> str:
        """What forwards the port to another machine, as this one names itself."""
        port, user = self.server_port, "user"
        with suppress(KeyError, OSError, ImportError):  # a container's user may have no name
            user = getpass.getuser()
        return f"ssh -N -L {port}:127.0.0.1:{port} {user}@{platform.node() or 'this-machine'}"

    @property
    def server_port(self) -> int:
        """The port on 127.0.0.1."""
        return int(self._server.server_address[1])

    def wait(self) -> None:
        """Block until :meth:`close` or Ctrl-C."""
        while not self._closing.wait(0.5):
            pass

    def close(self) -> None:
        """Stop answering; a repeated call changes nothing."""
        if not self._closing.is_set():
            self._closing.set()
            self._server.shutdown()
            self._server.server_close()

    def __enter__(self) -> ReportServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _send(request: BaseHTTPRequestHandler, status: int, body: str = "", kind: str = "text/plain") -> None:
    content = body.encode("utf-8", "replace")
    request.send_response(status)
    for name, value in {
        "Content-Type": f"{kind}; charset=utf-8",
        "Content-Length": str(len(content)),
        "Cache-Control": "no-store",
        "Content-Security-Policy": "frame-ancestors 'none'",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(content)


def _answer(request: BaseHTTPRequestHandler, news: _News, closing: threading.Event) -> None:
    port = cast("ThreadingHTTPServer", request.server).server_port
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
    origin = request.headers.get("Origin")
    foreign = origin is not None and origin not in {f"http://{host}" for host in hosts}
    if request.headers.get("Host") not in hosts or foreign or request.headers.get("Sec-Fetch-Site") == "cross-site":
        _send(request, 403, "this report is for browsers on this machine, under its own address\n")
        return
    target = urlsplit(request.path)
    if target.path == "/":
        _send(request, 200, news.page(), "text/html")
    elif target.path == "/news":
        known, end = parse_qs(target.query).get("stamp", [""])[0], time.monotonic() + _HOLD_SECONDS
        while news.stamp() == known and time.monotonic() < end:
            if closing.wait(_LOOK_SECONDS):
                request.close_connection = True
                return
        if news.stamp() == known:
            _send(request, 204)
        else:
            _send(request, 200, news.content(), "application/json")
    else:
        _send(request, 404, "there is only one page here\n")


def serve(root: str | Path, port: int = 8765, title: str | None = None) -> None:
    """Serve the live report until Ctrl-C; prints its address.

    Args:
        root: a folder of runs, or one run's folder.
        port: 0 takes a free one.
        title: heading of the page.
    """
    with ReportServer(root, port, title) as server:
        print(f"report: {server.url} (Ctrl-C ends)", flush=True)
        print(f"from another machine, then at the same address there: {server.ssh_line}", flush=True)
        with suppress(KeyboardInterrupt):
            server.wait()

"""The report, live, on this machine's loopback address. Torch-free.

Runs are read again only when their files changed; the page asks every few seconds and gets "not modified" if none did.
"""

import hashlib
import http.server
import logging
import sys
import threading
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from steerscale.dashboard.report import Entry, embed, entry_of, page, page_data, points_for
from steerscale.dashboard.runs import BrokenRun, Progress, find_directories, read_or_broken
from steerscale.errors import SteerscaleError
from steerscale.rundir import CONFIG, STATUS

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
FILES = (CONFIG, STATUS, "metrics.jsonl")

Stamp = tuple[tuple[int, int], ...]


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A tab that is closed while it loads is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class LiveRuns:
    """Condensed runs, kept up to date."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._known: dict[Path, tuple[Stamp, int, Entry | BrokenRun]] = {}
        self._lock = threading.Lock()
        self._tag, self._text = "", b""

    def update(self, progress: Progress = lambda done, total: None) -> tuple[str, bytes]:
        """Read what changed; (tag, JSON of the page's data). The tag changes with the runs."""
        with self._lock:
            directories = find_directories(self._paths, none_is_fine=True)  # deleted meanwhile, all of them perhaps
            points = points_for(len(directories))
            known: dict[Path, tuple[Stamp, int, Entry | BrokenRun]] = {}
            for index, directory in enumerate(directories):
                progress(index, len(directories))
                stamp, before = _stamp(directory), self._known.get(directory)
                # What could not be read may be readable now though nothing changed: moved away and back, a disk that hung.
                if before is not None and before[:2] == (stamp, points) and isinstance(before[2], Entry):
                    known[directory] = before
                    continue
                run = read_or_broken(directory)
                known[directory] = (stamp, points, run if isinstance(run, BrokenRun) else entry_of(run, points=points))
            progress(len(directories), len(directories))
            self._known = known
            stamps = repr([(str(path), stamp, isinstance(run, Entry)) for path, (stamp, _, run) in known.items()])
            tag = f'"{hashlib.sha256(stamps.encode()).hexdigest()[:32]}"'
            if tag != self._tag:
                found = [entry for _, _, entry in known.values()]
                data = page_data(
                    [entry for entry in found if isinstance(entry, Entry)],
                    [entry for entry in found if isinstance(entry, BrokenRun)],
                )
                self._tag, self._text = tag, embed(data).encode()
            return self._tag, self._text


def _stamp(directory: Path) -> Stamp:
    """Size and time of the files a report is made of; a missing one has neither."""
    stats = []
    for name in FILES:
        try:
            stat = (directory / name).stat()
            stats.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            stats.append((-1, -1))
    return tuple(stats)


def make_server(runs: LiveRuns, *, port: int, refresh_s: float) -> http.server.ThreadingHTTPServer:
    """A server on 127.0.0.1 that has not begun to serve; port 0 takes a free one.

    Raises SteerscaleError if the port is taken.
    """
    html = page(None, refresh_s=refresh_s).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        """GET / and GET /data.json."""

        def do_GET(self) -> None:
            """Answer one request."""
            # A page of another site may point its own name at 127.0.0.1 and read along; its name gives it away.
            host = self.headers.get("Host", "").split(":")[0]
            if host.lower() not in (LOOPBACK, "localhost"):
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"open this page as http://127.0.0.1:PORT/")
                return
            target = urlsplit(self.path).path
            if target == "/":
                self._answer(HTTPStatus.OK, "text/html; charset=utf-8", html)
            elif target == "/data.json":
                tag, text = runs.update()
                unchanged = self.headers.get("If-None-Match") == tag
                status = HTTPStatus.NOT_MODIFIED if unchanged else HTTPStatus.OK
                self._answer(status, "application/json", b"" if unchanged else text, tag)
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is / and /data.json")

        def _answer(self, status: HTTPStatus, kind: str, body: bytes, tag: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if tag:
                self.send_header("ETag", tag)
            if status != HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are of no interest to whoever started this."""
            logger.debug(format, *args)

    try:
        return _Server((LOOPBACK, port), Handler)
    except OSError as error:
        raise SteerscaleError(
            f"--port {port} on {LOOPBACK} cannot be used: {error}; choose another, 0 for a free one"
        ) from error

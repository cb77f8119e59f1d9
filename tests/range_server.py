"""A web server for a folder that serves byte ranges and counts what it is asked for, as an object store does."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves `folder`.

    Attributes:
        requests: (method, path, range header) of everything that was asked.
        fail: path -> list of statuses that the next requests for it get; a status of 0 cuts the connection.
        has_ranges: whether the Range header is obeyed.
        has_versions: whether an ETag is sent.
        num_sent: bytes of all bodies.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, str]] = []
        self.fail: dict[str, list[int]] = {}
        self.has_ranges = self.has_versions = True
        self.num_sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def gets(self, path: str) -> list[str]:
        """Ranges that were fetched of one path, in order, but for the byte that shows whether there are ranges."""
        gets = [asked for method, found, asked in self.requests if (method, found) == ("GET", path)]
        return [asked for asked in gets if asked != "bytes=1-1"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait for the acknowledgement of its header
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        asked = self.headers.get("Range", "")
        self.server.requests.append((self.command, self.path, asked))
        if statuses := self.server.fail.get(self.path):
            status = statuses.pop(0)
            if status == 0:
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self._send(status, b"", has_body)
            return
        path = self.server.folder / self.path.lstrip("/")
        if path.is_dir():
            names = sorted(file.name for file in path.iterdir())
            self._send(200, "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode(), has_body, html=True)
        elif not path.is_file():
            self._send(404, b"", has_body)
        else:
            data, status = path.read_bytes(), 200
            tag = f'"{path.stat().st_mtime_ns}"'
            if asked and self.server.has_ranges:
                first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())  # type: ignore[union-attr]
                data, status = data[first : last + 1], 206
            self._send(status, data, has_body, tag)

    def _send(self, status: int, data: bytes, has_body: bool, tag: str = "", html: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if tag and self.server.has_versions:
            self.send_header("ETag", tag)
        if html:
            self.send_header("Content-Type", "text/html")
        self.end_headers()
        if has_body:
            for start in range(0, len(data), 2**20):
                self.wfile.write(data[start : start + 2**20])
                self.server.num_sent += len(data[start : start + 2**20])

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""Servers on the loopback that serve files, and fail exactly where a test says so."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class Server:
    """A web server in a thread.

    Attributes:
        files: path → content. headers: path → further headers.
        ranges: whether ``Range`` is answered; many servers do not.
        cuts: numbers of bytes; each GET takes one off, sends so many bytes of its body, and closes the connection.
        before_cut: called with that number before the connection is closed.
        status: path → status to answer in place of the file.
        held: released when a GET of ``hold`` has sent half of its body; it goes on when ``go`` is set.
        seen: (method, path, Range or None) of every request.
        guard: a request → the answer in place of the file or of the server behind, None = let it pass.
    """

    def __init__(self, upstream: str | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.status: dict[str, int] = {}
        self.ranges = True
        self.cuts: list[int] = []
        self.before_cut: Callable[[int], Any] = lambda count: None
        self.hold = ""
        self.held, self.go = threading.Semaphore(0), threading.Event()
        self.seen: list[tuple[str, str, str | None]] = []
        self.upstream = upstream
        self.guard: Callable[[BaseHTTPRequestHandler], Answer | None] = lambda request: None
        handler = type("OfThisServer", (_Handler,), {"of": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def gets(self) -> list[tuple[str, str | None]]:
        return [(path, wanted) for method, path, wanted in self.seen if method == "GET"]

    def close(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    of: Server
    protocol_version = "HTTP/1.1"

    def answer(self) -> Answer:
        if (instead := self.of.guard(self)) is not None:
            return instead
        if self.of.upstream is not None:  # a proxy before a real server
            length = int(self.headers.get("Content-Length", 0))
            host = urlsplit(self.of.upstream)
            connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=300)
            connection.request(self.command, self.path, self.rfile.read(length) or None, dict(self.headers))
            response = connection.getresponse()
            body = response.read()
            headers = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            return response.status, {"Content-Length": str(len(body)), **headers}, body
        path = self.path.partition("?")[0]
        if path in self.of.status or path not in self.of.files:
            return self.of.status.get(path, 404), {"Content-Length": "0"}, b""
        body, status = self.of.files[path], 200
        wanted = self.headers.get("Range")
        headers = dict(self.of.headers.get(path, {"ETag": f'"{hash(body)}"'}))
        if wanted and self.of.ranges:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        return status, {"Content-Length": str(len(body)), **headers}, body

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.of.seen.append((self.command, self.path, self.headers.get("Range")))
        status, headers, body = self.answer()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):  # a client that gave up
            if self.of.hold and self.of.hold in self.path:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.of.held.release()
                self.of.go.wait()
                body = body[len(body) // 2 :]
            if body and status < 300 and self.of.cuts:
                count = self.of.cuts.pop(0)
                self.wfile.write(body[:count])
                self.wfile.flush()
                self.of.before_cut(count)
                self.close_connection = True
                return
            self.wfile.write(body)

    do_POST = do_PUT = do_GET

    def log_message(self, *args: Any) -> None:
        pass

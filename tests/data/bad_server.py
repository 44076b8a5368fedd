"""A real HTTP server on this machine that misbehaves as told, and a wire in front of any server that falls silent."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler"], None]


@dataclass
class Asked:
    """One request as the server saw it."""

    path: str
    offset: int | None
    if_range: str
    authorization: str


@dataclass
class BadServer:
    """Files by path; for each path, answers that are given first, one a request."""

    files: dict[str, bytes] = field(default_factory=dict)
    first: dict[str, list[Answer]] = field(default_factory=dict)
    always: dict[str, Answer] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)  # paths of answers that were taken to their end
    ranges: bool = True

    def __enter__(self) -> BadServer:
        handler = type("Bound", (Handler,), {"world": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.gone = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.gone.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{path}"

    def offsets(self, path: str) -> list[int | None]:
        return [asked.offset for asked in self.asked if asked.path == path]


class Handler(BaseHTTPRequestHandler):
    world: BadServer

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.name = self.path.split("?")[0].strip("/")
        span = self.headers.get("Range", "")
        offset = int(span.removeprefix("bytes=").split("-")[0]) if span else None
        if_range = self.headers.get("If-Range", "")
        self.world.asked.append(Asked(self.name, offset, if_range, self.headers.get("Authorization", "")))
        waiting = self.world.first.get(self.name)
        answer = waiting.pop(0) if waiting else self.world.always.get(self.name, well)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            answer(self)
            self.world.sent.append(self.name)
        self.close_connection = True

    def begin(self, *, length: bool = True, extra: dict[str, str] | None = None) -> bytes | None:
        """Status and headers of a good answer; the bytes that ought to follow."""
        content = self.world.files.get(self.name)
        if content is None:
            self.send_error(404)
            return None
        asked = self.world.asked[-1]
        etag = self.world.etags.get(self.name, '"v1"')
        offset = asked.offset if self.world.ranges and asked.if_range in ("", etag) else None
        if offset is not None and offset >= len(content):
            self.send_error(416)
            return None
        self.send_response(200 if offset is None else 206)
        if etag:
            self.send_header("ETag", etag)
        if length:
            self.send_header("Content-Length", str(len(content) - (offset or 0)))
        if offset is not None:
            self.send_header("Content-Range", f"bytes {offset}-{len(content) - 1}/{len(content)}")
        self.send_header("Date", formatdate(usegmt=True))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        return content[offset or 0 :]


def well(handler: Handler) -> None:
    body = handler.begin()
    if body is not None:
        handler.wfile.write(body)


def status(code: int, **headers: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def cut(after: int, length: bool = True, reset: bool = False) -> Answer:
    """Ends `after` bytes into the body; by a reset of the connection, or politely."""

    def answer(handler: Handler) -> None:
        body = handler.begin(length=length)
        if body is None:
            return
        handler.wfile.write(body[:after])
        handler.wfile.flush()
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    return answer


def chunked(after: int | None = None) -> Answer:
    """The body in the chunks of HTTP/1.1, of no stated length; ends without the last one `after` bytes."""

    def answer(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        body = handler.begin(length=False, extra={"Transfer-Encoding": "chunked"}) or b""
        for first in range(0, len(body[:after]), 10_000):
            chunk = body[:after][first : first + 10_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        if after is None:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def stall(after: int) -> Answer:
    """Falls silent `after` bytes into the body, and keeps the connection."""

    def answer(handler: Handler) -> None:
        body = handler.begin()
        if body is not None:
            handler.wfile.write(body[:after])
            handler.wfile.flush()
            handler.world.gone.wait(60)

    return answer


def trickle(chunk: int, pause_s: float) -> Answer:
    def answer(handler: Handler) -> None:
        body = handler.begin() or b""
        for first in range(0, len(body), chunk):
            handler.wfile.write(body[first : first + chunk])
            handler.wfile.flush()
            if handler.world.gone.wait(pause_s):
                return

    return answer


def body(content: bytes, **headers: str) -> Answer:
    """Other bytes than those of the file, with a length that fits them."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def slow_headers(pause_s: float) -> Answer:
    """One header line after another, for ever: no single wait is long."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        began = time.monotonic()
        while time.monotonic() - began < 60 and not handler.world.gone.wait(pause_s):
            handler.wfile.write(b"X-Wait: 1\r\n")
            handler.wfile.flush()

    return answer


class Wire:
    """Relays connections to a port of this machine; falls silent when `most` bytes have come back through it."""

    def __init__(self, port: int, most: int | None = None):
        self.passed, self._most, self._port = 0, most, port
        self._closed, self._lock = False, threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open = [self._listening]
        self.port = self._listening.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc_info) -> None:
        with self._lock:  # a connection that is accepted from now on closes itself
            self._closed = True
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _start(self, work: Callable, *args) -> None:
        threading.Thread(target=work, args=args, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                there = socket.create_connection(("127.0.0.1", self._port))
                with self._lock:
                    if self._closed:
                        here.close()
                        there.close()
                        return
                    self._open += [here, there]
                self._start(self._relay, here, there, False)
                self._start(self._relay, there, here, True)

    def _relay(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                if counted:
                    if self._most is not None and self.passed + len(chunk) > self._most:
                        return
                    self.passed += len(chunk)
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

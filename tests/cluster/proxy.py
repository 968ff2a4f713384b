"""A proxy between a client and an API server that fails on demand.

The client connects to it with HTTP on this machine; it connects to the API server with HTTPS, with
the client's credentials. Streams, which are watches and logs, are forwarded line by line.

A rule defines what happens to requests of one kind, a number of times: `drop`, `answer`,
`lose_answer`, `hold`, `cut`, `stall`. `Proxy.cut` and `Proxy.stall` act on streams that are already
open. A request that matches no rule is forwarded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

PASSED_ON = ("authorization", "accept", "content-type")
PATIENCE = 30.0
"""Seconds after which everything that a test holds back continues, so that a failed test ends."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A client's request; ``at`` is a time of the monotonic clock."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    at: float


Fault = Callable[["Exchange"], None]


@dataclasses.dataclass
class Rule:
    """What happens to requests of one kind."""

    fault: Fault
    method: str
    path: re.Pattern[str]
    query: dict[str, str]
    left: float
    met: threading.Event = dataclasses.field(default_factory=threading.Event)

    def fits(self, request: Request) -> bool:
        return (
            self.left > 0
            and re.fullmatch(self.method, request.method) is not None
            and self.path.search(request.path) is not None
            and self.query.items() <= request.query.items()
        )

    def wait(self, within: float = PATIENCE) -> None:
        """Waits until a request has matched it."""
        assert self.met.wait(within), f"no {self.method} {self.path.pattern} within {within} s"

    def remove(self) -> None:
        self.left = 0


class Exchange:
    """A request in progress, and what is done with it."""

    def __init__(
        self, request: Request, handler: BaseHTTPRequestHandler, connect: Callable[[], Any]
    ) -> None:
        self.request = request
        self.flows = threading.Event()
        self.flows.set()
        self._handler = handler
        self._connect = connect
        self._server: Any = None

    def forward(self, lines: float = float("inf"), then: str = "cut") -> None:
        """Forwards the request to the API server, and the response to the client.

        Args:
            lines: The number of lines of a stream to forward before the fault.
            then: The fault: ``cut`` or ``stall``.
        """
        with self._asked() as answer:
            if answer.getheader("Content-Length") is not None:
                self.answer(answer.status, answer.read(), answer.getheader("Content-Type", ""))
                return
            self.begin(answer.status, answer.getheader("Content-Type", ""))
            while line := answer.readline():
                if lines <= 0 and then == "cut":
                    self.drop()
                    return
                if lines <= 0:
                    self.flows.clear()
                lines -= 1
                self.line(line)
            self.end()

    def forward_and_lose(self) -> None:
        """Forwards the request to the API server and keeps the response."""
        with self._asked() as answer:
            answer.read()
        self.drop()

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        """Responds in place of the API server, or with its response."""
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", kind)
        self._handler.send_header("Content-Length", str(len(body)))
        self._handler.end_headers()
        self._handler.wfile.write(body)

    def begin(self, status: int = 200, kind: str = "application/json") -> None:
        """Starts a stream."""
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", kind)
        self._handler.send_header("Transfer-Encoding", "chunked")
        self._handler.end_headers()

    def line(self, line: bytes) -> None:
        """Sends a line of a stream, once it is not stalled."""
        self.flows.wait(PATIENCE)
        self._handler.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self._handler.wfile.flush()

    def end(self) -> None:
        """Ends a stream properly."""
        self._handler.wfile.write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Closes the connection, whatever is in progress."""
        self._handler.close_connection = True
        self.flows.set()
        for sock in (self._handler.connection, getattr(self._server, "sock", None)):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _asked(self) -> Iterator[http.client.HTTPResponse]:
        headers = {name: self._handler.headers[name] for name in PASSED_ON}
        given = {name: value for name, value in headers.items() if value is not None}
        with contextlib.closing(self._connect()) as self._server:
            self._server.request(
                self.request.method, self._handler.path, self.request.body or None, given
            )
            with self._server.getresponse() as answer:
                yield answer


class Proxy:
    """Forwards requests to one API server, except those that match a rule.

    Args:
        server: The API server's address; None if rules respond to everything.
        ca: The certificate that signed the API server's.
    """

    def __init__(self, server: str | None = None, ca: Path | None = None) -> None:
        self.requests: list[Request] = []
        self._rules: list[Rule] = []
        self._open: set[Exchange] = set()
        self._lock = threading.Lock()
        self._address = urlsplit(server or "").netloc
        self._trust = ssl.create_default_context(cafile=str(ca)) if ca else None
        self._http = _Server(("127.0.0.1", 0), self._handler_class())
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()
        self._http.shutdown()
        self._http.server_close()

    def add(
        self,
        fault: Fault,
        method: str = "GET",
        path: str = "",
        times: float = float("inf"),
        **query: str,
    ) -> Rule:
        """Adds a rule; the last rule that matches a request applies.

        Args:
            fault: What happens to matching requests.
            method: A pattern for the method, such as ``GET|POST``.
            path: A pattern to find in the path.
            times: How often the rule applies.
            **query: Values that the query must have: ``watch="true"``.
        """
        rule = Rule(fault, method, re.compile(path), query, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def cut(self, path: str = "") -> None:
        """Closes the connections of open streams."""
        for exchange in self._streams(path):
            exchange.drop()

    def stall(self, path: str = "") -> None:
        """Holds back the lines of open streams until they are released or cut."""
        for exchange in self._streams(path):
            exchange.flows.clear()

    def release(self, path: str = "") -> None:
        """Resumes stalled streams."""
        for exchange in self._streams(path):
            exchange.flows.set()

    def reset(self) -> None:
        """Deletes rules and requests, and closes open connections."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()
        self.cut()

    def count(self, method: str = "GET", path: str = "", **query: str) -> int:
        """How many requests of a kind there were."""
        kind = Rule(drop, method, re.compile(path), query, float("inf"))
        with self._lock:
            return sum(kind.fits(request) for request in self.requests)

    def _streams(self, path: str) -> list[Exchange]:
        with self._lock:
            return [each for each in self._open if re.search(path, each.request.path)]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        address = urlsplit(handler.path)
        request = Request(
            handler.command,
            address.path,
            dict(parse_qsl(address.query)),
            handler.rfile.read(length),
            time.monotonic(),
        )
        exchange = Exchange(request, handler, self._connect)
        with self._lock:
            self.requests.append(request)
            rule = next((each for each in reversed(self._rules) if each.fits(request)), None)
            if rule:
                rule.left -= 1
            self._open.add(exchange)
        try:
            if rule:
                rule.met.set()
            (rule.fault if rule else forward)(exchange)
        except (OSError, http.client.HTTPException, ValueError):
            # If one side is gone, close the other.
            exchange.drop()
        finally:
            with self._lock:
                self._open.discard(exchange)

    def _connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._address, context=self._trust, timeout=90)

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                proxy._handle(self)

            do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = _handle  # noqa: N815 - http.server's names

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: Any) -> None:
        """Ignores clients that hang up."""


# Faults


def forward(exchange: Exchange) -> None:
    """No fault at all."""
    exchange.forward()


def drop(exchange: Exchange) -> None:
    """Closes the connection without a response."""
    exchange.drop()


def say_nothing(exchange: Exchange) -> None:
    """Starts a stream and sends nothing."""
    exchange.begin()
    exchange.flows.clear()
    exchange.flows.wait(PATIENCE)
    exchange.drop()


def lose_answer(exchange: Exchange) -> None:
    """Lets the API server handle the request, and drops the response."""
    exchange.forward_and_lose()


def answer(status: int, reason: str, message: str) -> Fault:
    """Refuses a request like the API server."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status}
    text = json.dumps({**body, "reason": reason, "message": message}).encode()
    return lambda exchange: exchange.answer(status, text)


def lines(*texts: str) -> Fault:
    """Responds with a stream of lines that ends."""

    def fault(exchange: Exchange) -> None:
        exchange.begin()
        for text in texts:
            exchange.line(f"{text}\n".encode())
        exchange.end()

    return fault


def error_event(status: int, reason: str) -> Fault:
    """A watch that starts, and reports that it cannot continue."""
    thing = {"kind": "Status", "code": status, "reason": reason, "message": f"{reason}, in a watch"}
    return lines(json.dumps({"type": "ERROR", "object": thing}))


def hold(until: threading.Event) -> Fault:
    """Holds a request until an event is set."""

    def fault(exchange: Exchange) -> None:
        until.wait(PATIENCE)
        exchange.forward()

    return fault


def cut(after: int) -> Fault:
    """Closes a stream's connection after a number of lines."""
    return lambda exchange: exchange.forward(lines=after)


def stall(after: int) -> Fault:
    """Stalls a stream after a number of lines, until it is released or cut."""
    return lambda exchange: exchange.forward(lines=after, then="stall")

"""A real HTTP server on this machine that behaves like an OpenAI-compatible endpoint."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class QuietServer(ThreadingHTTPServer):
    """Does not report clients that hang up: the tests make them do so."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Does nothing."""


class Reply:
    """What the server does with one request: a status and a body, or a dropped connection.

    A reply that drips is sent byte by byte, with the given number of seconds between two bytes.
    """

    def __init__(
        self,
        body: object = None,
        status: int = 200,
        drop: bool = False,
        headers: dict[str, str] | None = None,
        drip: float = 0.0,
    ) -> None:
        self.body, self.status, self.drop = body, status, drop
        self.headers, self.drip = headers or {}, drip


def says(text: object, finish_reason: str = "stop") -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return Reply({"id": "x", "object": "chat.completion", "created": 0, "choices": [choice]})


def fails(status: int, message: str = "scripted") -> Reply:
    return Reply({"error": {"message": message}}, status)


Script = Callable[[dict[str, Any], int], Reply]


class Server:
    """Serves /v1/chat/completions. ``script`` gets a request's body and the item's attempt."""

    def __init__(self) -> None:
        self.script: Script = lambda body, attempt: says("So it is.\nAnswer: 8")
        self.seen: list[dict[str, Any]] = []
        self.authorization: set[str] = set()
        self.headers: dict[str, str] = {}
        self.attempts: dict[str, int] = {}
        self.most_at_once = self.now = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        item = name_of(body)
        with self.lock:
            assert handler.path == "/v1/chat/completions"
            self.seen.append(body)
            self.authorization.add(handler.headers["Authorization"])
            self.headers = dict(handler.headers)
            attempt = self.attempts[item] = self.attempts.get(item, 0) + 1
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        reply = self.script(body, attempt)
        with self.lock:
            self.now -= 1
        if reply.drop:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        data = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
        data = data.encode() if isinstance(data, str) else data
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            "Retry-After": "0",
            "Retry-After-Ms": "1",  # the client waits half a second otherwise
            **reply.headers,
        }
        try:
            handler.send_response(reply.status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            for at in range(0, len(data), 1 if reply.drip else len(data) or 1):
                handler.wfile.write(data[at : at + 1] if reply.drip else data)
                if reply.drip and self.ended.wait(reply.drip):
                    return
        except OSError:
            handler.close_connection = True  # the client is gone: its timeout has passed


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[1]["text"]


def name_of(body: dict[str, Any]) -> str:
    return text_of(body).rpartition("[s")[2].partition("]")[0]


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Starts the server."""
    it = Server()
    thread = threading.Thread(target=it.http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield it
    finally:
        it.ended.set()
        it.http.shutdown()
        thread.join()
        it.http.server_close()

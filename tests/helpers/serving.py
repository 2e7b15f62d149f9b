"""A server in a thread of this process, and plain clients for it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from runtime.model import Model
from runtime.server.app import application
from runtime.server.connections import Server, listen
from runtime.server.desk import Desk
from runtime.server.limits import Bounds


@dataclass
class Served:
    """A running server."""

    model: Model
    desk: Desk
    server: Server
    port: int
    thread: threading.Thread

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, **options: int) -> socket.socket:
        """A plain connection; options: of the socket, by name."""
        place = socket.socket()
        for name, value in options.items():
            place.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        place.settimeout(20)
        try:
            place.connect(("127.0.0.1", self.port))
        except OSError:
            place.close()
            raise
        return place

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request; a body that is not bytes is sent as JSON."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {} if body is None else {"Content-Type": "application/json"}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        client.request(method, path, data, given | {name.replace("_", "-"): value for name, value in headers.items()})
        answer = client.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        client.close()
        return found

    def complete(self, **fields: Any) -> tuple[int, Any]:
        """Status and JSON of a completion."""
        status, _, body = self.ask("POST", "/v1/completions", fields)
        return status, json.loads(body)

    def stop(self) -> None:
        """As SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)


@contextmanager
def serving(
    model: Model, *, keys: tuple[str, ...] = (), origins: tuple[str, ...] = (), hosts: set[str] | None = None,
    small_buffers: bool = False, **bounds: Any,
) -> Iterator[Served]:  # fmt: skip
    """small_buffers: the system holds only some kilobytes for a client that does not read."""
    place = listen("127.0.0.1", 0)
    if small_buffers:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    desk = Desk(model, "tide", Bounds(**bounds))
    ready = threading.Event()
    server = Server(application(desk, keys, origins, hosts), desk, ready.set)
    thread = threading.Thread(target=server.run, args=([place],))
    thread.start()
    try:
        assert ready.wait(20)
        yield Served(model, desk, server, place.getsockname()[1], thread)
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
        place.close()
    assert not thread.is_alive()
    assert not desk.writer.is_alive()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def post(body: dict[str, Any]) -> bytes:
    """A completion as bytes on the wire."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def events(stream: bytes) -> list[Any]:
    """What a stream's events hold; its end mark stays a string."""
    lines = [line.removeprefix("data: ") for line in stream.decode().split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def idle(served: Served) -> bool:
    """Whether no text is running or waiting."""
    return not (served.desk.orders or served.desk.writer.taken or served.desk.requests)

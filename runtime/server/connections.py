"""Sockets and signals: uvicorn, with limits for clients that are too many, too slow, or gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.server.desk import Desk

IDLE = 10.0  # seconds in which a request's headers must come
LINGER = 2.0  # seconds in which the rest of a refused body is read, so that the client gets to read the answer
LAST = 5.0  # seconds after the grace in which answers are sent to their end
MOST_HEADERS = 16384  # bytes
ENDS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Ends in two steps: on a signal no more requests are taken; when all texts have ended, or after the grace period,
    it stops. `signal` is then the one that ended it."""

    def __init__(self, app: Starlette, desk: Desk, on_ready: Callable[[], None]) -> None:
        bounds = desk.bounds
        connection = type("Connection", (Connection,), {"most": bounds.connections})
        super().__init__(
            uvicorn.Config(
                app, http=connection, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
                proxy_headers=False, h11_max_incomplete_event_size=MOST_HEADERS, timeout_keep_alive=75,
                timeout_graceful_shutdown=int(LAST), backlog=min(2048, 2 * bounds.connections),
            )
        )  # fmt: skip
        self.desk, self.on_ready = desk, on_ready
        self.signal: int | None = None
        self.deadline = 0.0
        self.watch = Watch(bounds.client_timeout)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.desk.open(asyncio.get_running_loop())
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.desk.close()

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if counter % 10 == 0:
            self.watch.look(self.server_state.connections, now)
        if self.signal is not None:
            if now > self.deadline + LAST:
                self.drop_all()
            if not self.desk.requests:
                self.should_exit = True
            elif now > self.deadline:
                self.desk.cut_off()
        return await super().on_tick(counter)

    def drop_all(self) -> None:
        """Close what is left: clients that do not read to the end."""
        for connection in [*self.server_state.connections]:
            if connection.transport is not None:
                connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the grace period, a second Ctrl+C ends it."""
        if self.signal is None:
            self.signal, self.deadline = sig, time.monotonic() + self.desk.bounds.grace
            self.desk.drain()
        elif sig == signal.SIGINT:
            self.deadline = time.monotonic()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, this does not raise the signal again at the end: the process ends by itself."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in ENDS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Connection(H11Protocol):
    most = 512

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()


class Watch:
    """Closes connections whose client keeps the server waiting. uvicorn alone limits only the time between requests."""

    def __init__(self, patience: float) -> None:
        """patience: seconds in which a client must take what waits for it."""
        self.patience = patience
        self.states: WeakKeyDictionary[Any, tuple[str, float]] = WeakKeyDictionary()  # state, and since when
        self.limits = {"headers": IDLE, "body": LINGER, "unread": patience}

    def look(self, connections: Any, now: float) -> None:
        for connection in [*connections]:
            state = state_of(connection)
            before, since = self.states.get(connection, ("", now))
            if state != before:
                since = now
            self.states[connection] = state, since
            if now - since > self.limits.get(state, float("inf")):
                connection.transport.abort()


def state_of(connection: Any) -> str:
    """What a connection waits for: "unread", the client's reading; "headers"; "body", the rest of one whose answer was
    sent; "" nothing of this."""
    if connection.transport is None or (connection.transport.is_closing() and not unread(connection)):
        return ""
    if unread(connection):
        return "unread"
    if connection.cycle is None:
        return "headers"
    if connection.cycle.response_complete:
        if connection.conn.their_state is h11.SEND_BODY:
            return "body"
        return "headers" if connection.timeout_keep_alive_task is None else ""
    return ""


def unread(connection: Any) -> bool:
    """Whether bytes that were written wait for the client, beyond what the system's buffers hold."""
    return connection.transport is not None and connection.transport.get_write_buffer_size() > 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, but does not listen yet. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    place = socket.socket(family, socket.SOCK_STREAM)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError:
        place.close()
        raise
    return place


class Discreet(logging.Formatter):
    """Tracebacks without the errors' messages, which may quote what a client sent."""

    def formatException(self, ei: Any) -> str:
        error: BaseException | None = ei[1]
        parts: list[str] = []
        while error is not None:
            parts.insert(0, "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "Traceback (most recent call last):\n" + ", then\n".join(parts)


def set_up_log() -> None:
    """Lines on standard error: requests, and errors of this server and of uvicorn."""
    handler = logging.StreamHandler()
    handler.setFormatter(Discreet("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    for name, level in (("dmpt_export.server", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True

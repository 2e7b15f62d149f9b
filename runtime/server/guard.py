"""What every request passes first: the log, the host it was sent to, and the API key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Collection
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import KEY, Refused

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/health", "/health/live")  # without a key, and not logged: probes ask every few seconds
COUNTS = "dmpt_export.counts"  # in the scope: what the log says of a completion
log = logging.getLogger("dmpt_export.server")


class Guard:
    """Wraps an application."""

    def __init__(self, app: ASGIApp, keys: Collection[str] = (), hosts: Collection[str] | None = None) -> None:
        """keys: any of them opens; none: no key is asked for. hosts: names by which the server may be addressed,
        without port; None: any.

        A web page that a browser shows can make its own name point to 127.0.0.1 (DNS rebinding) and then read what a
        local server answers. Its requests still carry that name.
        """
        self.app = app
        self.keys = [digest(key) for key in keys]
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, status, number = time.perf_counter(), 0, uuid4().hex[:12]
        counts: dict[str, int] = {}
        scope[COUNTS] = counts

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", number.encode())]
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, receive, noted)
        except Refused as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, noted)
        except Exception:
            status = status or 500
            raise
        finally:
            if scope["path"] not in OPEN:
                seconds = time.perf_counter() - start
                log.info("%s %s %s %s %s%.3f s", number, scope["method"], shown(scope["path"]), status or "gone",
                         "".join(f"{name} {n}, " for name, n in counts.items()), seconds)  # fmt: skip

    def check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"] in OPEN:
            return
        if self.hosts is not None and host_of(headers.get("host", "")) not in self.hosts:
            raise Refused(403, "this server answers only requests to its own name on this machine: use localhost, or "
                          "start it with an API key or with --allow-host", code="wrong_host")  # fmt: skip
        if self.keys:
            kind, _, key = headers.get("authorization", "").partition(" ")
            given = digest(key.strip())
            if kind.lower() != "bearer" or not any(hmac.compare_digest(given, known) for known in self.keys):
                raise Refused(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", None,
                              "invalid_api_key", KEY)  # fmt: skip


def digest(key: str) -> bytes:
    """Of equal length for all keys, so that comparing takes equally long."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def host_of(header: str) -> str:
    """The name in a Host header, without its port.

    >>> host_of("LOCALHOST:8080"), host_of("[::1]:8080"), host_of("[::1]"), host_of("127.0.0.1")
    ('localhost', '[::1]', '[::1]', '127.0.0.1')
    """
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() and (":" not in name or name.endswith("]")) else header).lower()


def shown(path: str) -> str:
    """A path that cannot break the log's lines.

    >>> shown("/v1/models"), shown("/\\nPOST")
    ('/v1/models', '/\\\\nPOST')
    """
    return ascii(path[:80])[1:-1]


def counts_of(scope: Scope) -> dict[str, Any]:
    counts: dict[str, Any] = scope[COUNTS]
    return counts

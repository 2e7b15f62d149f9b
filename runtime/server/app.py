"""The application: paths, bodies and answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime.server.desk import Desk, Order
from runtime.server.dialect import read_json, read_request
from runtime.server.errors import BROKEN, BUSY, MISSING, Refused
from runtime.server.guard import Guard, counts_of
from runtime.server.parts import Answer

NO_CHAT = "this server has no chat: its models continue text and have no chat template; use /v1/completions"


def application(
    desk: Desk, keys: Collection[str] = (), origins: Collection[str] = (), hosts: Collection[str] | None = None
) -> Starlette:
    """keys, hosts: see Guard. origins: web pages that a browser lets read answers; none by default."""
    middleware = [Middleware(Guard, keys=keys, hosts=hosts)]
    if origins:
        cors = Middleware(CORSMiddleware, allow_origins=[*origins], allow_methods=["GET", "POST"],
                          allow_headers=["authorization", "content-type"])  # fmt: skip
        middleware.insert(0, cors)  # a preflight has no key

    def model(request: Request) -> Response:
        if request.path_params["name"] != desk.name:
            raise Refused(
                404, f"there is no such model: this server has {desk.name!r}", "model", "model_not_found", MISSING
            )
        return JSONResponse(card(desk))

    async def health(request: Request) -> Response:
        status, body = desk.health()
        return JSONResponse(body, status)

    async def live(request: Request) -> Response:
        well = desk.writer.is_well
        return JSONResponse({"status": "ok" if well else "stuck"}, 200 if well else 503)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(desk.page(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card(desk)]})

    async def model_of_name(request: Request) -> Response:
        return model(request)

    async def chat(request: Request) -> Response:
        raise Refused(404, NO_CHAT, code="no_chat", kind=MISSING)

    routes = [
        Route("/v1/completions", Completions(desk), methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model_of_name),
        Route("/health", health),
        Route("/health/live", live),
        Route("/metrics", metrics),
    ]
    handlers: Any = {Refused: refused, HTTPException: missing, Exception: broken}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def card(desk: Desk) -> dict[str, Any]:
    return {
        "id": desk.name, "object": "model", "created": desk.created, "owned_by": "dmpt-export",
        "context_length": desk.model.context,
    }  # fmt: skip


async def refused(request: Request, error: Refused) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def missing(request: Request, error: HTTPException) -> Response:
    """No such path, or not with this method."""
    return JSONResponse(
        Refused(error.status_code, str(error.detail), kind=MISSING).body, error.status_code, error.headers
    )


async def broken(request: Request, error: Exception) -> Response:
    """A bug; uvicorn logs it."""
    return JSONResponse(Refused(500, "the server failed: its log has the reason", kind=BROKEN).body, 500)


class Completions:
    """POST /v1/completions."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status, desk = time.perf_counter(), 500, self.desk
        desk.requests += 1
        try:
            order = await self.order(scope, receive)
            if order is not None:
                await self.answer(order, scope, receive, send)
            status = 499 if order is None or order.gone else 200
        except Refused as error:
            status = error.status
            raise
        finally:
            desk.requests -= 1
            desk.metrics.answers[status] += 1
            desk.metrics.seconds.observe(time.perf_counter() - began)

    async def order(self, scope: Scope, receive: Receive) -> Order | None:
        """Read the request and admit it; None when the client goes before it is complete."""
        budget = Budget(self.desk)
        try:
            body = await budget.read(scope, receive)
            if body is None:
                return None
            asked = read_request(read_json(body), self.desk.name, self.desk.bounds)
            return await self.desk.admit(asked)
        finally:
            budget.give_back()

    async def answer(self, order: Order, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(order)
        watch = asyncio.create_task(leave_with_client(order, receive))
        try:
            if order.asked.stream:
                await stream(answer, send)
            elif (body := await answer.whole()) is not None:
                await JSONResponse(body)(scope, receive, send)
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
            if order.open:
                order.leave()
            counts_of(scope).update(prompt=order.prompt_tokens, new=order.new_tokens)


async def leave_with_client(order: Order, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    order.leave()


async def stream(answer: Answer, send: Send) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for body in answer.stream():
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Budget:
    """Reads the body of one request, within limits of its size, of its time, and of all bodies together."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.used = desk, 0

    def give_back(self) -> None:
        self.desk.bodies -= self.used
        self.used = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None when the client goes. Raises Refused."""
        bounds, headers = self.desk.bounds, Headers(scope=scope)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "send the request as Content-Type: application/json")  # which no HTML form can
        length = headers.get("content-length", "0")
        if len(length) > 15 or int(length) > bounds.max_body:
            raise self.too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(bounds.client_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    self.take(len(message["body"]))
                    body += message["body"]
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, f"the request was not complete within {bounds.client_timeout:g} s") from None

    def take(self, size: int) -> None:
        self.used += size
        self.desk.bodies += size
        if self.used > self.desk.bounds.max_body:
            raise self.too_large()
        if self.desk.bodies > self.desk.bounds.bodies:
            raise Refused(429, "too many large requests at once: try again later", code="queue_full", kind=BUSY)

    def too_large(self) -> Refused:
        return Refused(413, f"a request may have at most {self.desk.bounds.max_body} bytes")

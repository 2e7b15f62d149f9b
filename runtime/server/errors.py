"""Refusals as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

INVALID, MISSING, KEY, BUSY, BROKEN = (
    "invalid_request_error", "not_found_error", "authentication_error", "rate_limit_error", "server_error",
)  # fmt: skip


class Refused(Exception):
    """A request that is answered with an error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, kind: str = INVALID
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind

    @property
    def body(self) -> dict[str, Any]:
        """{"error": ...}, the form of both answers and events of a stream."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What a client needs to try again."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": "1"} if self.status in (429, 503) else {}


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refused:
    return Refused(400, message, param, code)


def ending() -> Refused:
    return Refused(503, "the server is shutting down: try again, or another replica", code="shutting_down", kind=BROKEN)

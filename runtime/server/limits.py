"""What one server allows. Every number bounds memory or time that clients can use up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    parallel: int = 16  # texts written together, each with a row in the caches
    queue: int = 64  # texts that wait for a row; more are refused with 429
    max_tokens: int | None = None  # new tokens of one text; None: as many as the context holds
    max_texts: int = 16  # texts of one request: its prompts times n
    max_body: int = 1 << 20  # bytes of one request
    connections: int = 512  # open at once; more are closed at once
    client_timeout: float = 30.0  # seconds to send a request, and to take what has been written
    grace: float = 30.0  # seconds that running texts have to end after SIGTERM
    exact: bool = False  # texts are written in turn, not together, so that they do not change each other's rounding

    @property
    def bodies(self) -> int:
        """Bytes of all requests that are being read at once."""
        return 32 * self.max_body

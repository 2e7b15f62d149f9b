"""Clients for benchmarks.evidence.serving: good ones that check what they get, and bad ones of every kind."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

PLACE = "127.0.0.1"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(PLACE, port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def request(body: dict[str, Any] | bytes, length: int | None = None) -> bytes:
    """A completion; length: what its head claims."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(data) if length is None else length}\r\n\r\n"
    )
    return head.encode() + data


@dataclass
class Answer:
    status: int
    text: str = ""
    tokens: int = 0
    first_s: float = 0.0  # until the first token
    seconds: float = 0.0
    gap_s: float = 0.0  # longest wait between two pieces


async def complete(port: int, body: dict[str, Any]) -> Answer:
    """One completion of one text, as a stream or whole. Raises OSError or ValueError for an answer that breaks off."""
    began, first, gap, last = time.perf_counter(), 0.0, 0.0, 0.0
    async with connection(port) as (reader, writer):
        writer.write(request(body))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        status, data = int(head.split(" ", 2)[1]), b""
        while piece := await reader.read(65536):
            now = time.perf_counter()
            first, gap = first or now - began, max(gap, now - (last or now))
            last, data = now, data + piece
    if "transfer-encoding: chunked" in head:
        data = unchunked(data)
    answer = Answer(status, first_s=first, seconds=time.perf_counter() - began, gap_s=gap)
    if status != 200:
        return answer
    if not body.get("stream"):
        whole = json.loads(data)
        answer.text, answer.tokens = whole["choices"][0]["text"], whole["usage"]["completion_tokens"]
        return answer
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]":
        raise ValueError("the stream broke off")
    for part in map(json.loads, lines[:-1]):
        answer.text += "".join(choice["text"] for choice in part["choices"])
        answer.tokens = (part.get("usage") or {}).get("completion_tokens", answer.tokens)
    return answer


def unchunked(data: bytes) -> bytes:
    """The body in HTTP chunks. Raises ValueError unless the last one is there."""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return body
        body, data = body + data[:length], data[length + 2 :]


@dataclass
class Tally:
    """What good clients met."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)  # another text, an error after admission, a broken stream
    refused: int = 0  # 429; asked again
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)


async def good(port: int, cases: list[tuple[str, int, str]], tally: Tally, end: float, seed: int) -> None:
    """Ask for texts one after the other until `end`, and compare each with what it must be."""
    chosen = random.Random(seed)
    while time.monotonic() < end:
        prompt, most, want = chosen.choice(cases)
        body = {"prompt": prompt, "max_tokens": most, "temperature": 0, "stream": chosen.random() < 0.5}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        try:
            answer = await complete(port, body)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            tally.wrong.append(f"{type(error).__name__}: {error}")
            continue
        if answer.status == 429:
            tally.refused += 1
            await asyncio.sleep(chosen.uniform(0.2, 1.0))
        elif answer.status != 200 or answer.text != want:
            tally.wrong.append(f"status {answer.status}, {len(answer.text)} characters of {len(want)}")
        else:
            tally.right += 1
            tally.tokens += answer.tokens
            tally.seconds.append(answer.seconds)
            tally.first_s.append(answer.first_s)


# --- bad ones ------------------------------------------------------------------------------------------

LONG = {"prompt": "A", "max_tokens": 200, "n": 4, "logprobs": 5, "stream": True}


async def leaves(port: int, chosen: random.Random) -> str:
    """Goes after the first bytes of a text."""
    async with connection(port) as (reader, writer):
        writer.write(request(LONG))
        await reader.read(chosen.randint(1, 400))
        return "left"


async def reads_a_byte_a_second(port: int, chosen: random.Random) -> str:
    async with connection(port) as (reader, writer):
        writer.write(request(LONG))
        for _ in range(20):
            if not await reader.read(1):
                return "closed"
            await asyncio.sleep(1)
        return "left"


async def never_reads(port: int, chosen: random.Random) -> str:
    async with connection(port) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request(LONG))
        await asyncio.sleep(chosen.uniform(5, 40))
        return "left"


async def sends_half(port: int, chosen: random.Random) -> str:
    async with connection(port) as (reader, writer):
        whole = request({"prompt": "A"})
        writer.write(whole[: chosen.randrange(len(whole) - 1)])
        return status_of(await reader.read(100))


async def drips(port: int, chosen: random.Random) -> str:
    """A byte every tenth of a second."""
    async with connection(port) as (reader, writer):
        for byte in request({"prompt": "A" * 1000}):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.1)
        return status_of(await reader.read(100))


async def sends_much(port: int, chosen: random.Random) -> str:
    """50 MB, as announced or as chunks."""
    async with connection(port) as (reader, writer):
        chunked = chosen.random() < 0.5
        head = request(b"", 50_000_000).decode()
        writer.write(
            (head.replace("Content-Length: 50000000", "Transfer-Encoding: chunked") if chunked else head).encode()
        )
        for _ in range(500):
            writer.write(b"186a0\r\n" * chunked + b"a" * 100_000 + b"\r\n" * chunked)
            await writer.drain()
        return status_of(await reader.read(100))


async def talks_nonsense(port: int, chosen: random.Random) -> str:
    async with connection(port) as (reader, writer):
        writer.write(chosen.randbytes(chosen.randint(1, 100_000)) + b"\r\n\r\n")
        return status_of(await reader.read(100))


async def asks_wrongly(port: int, chosen: random.Random) -> str:
    """Fields, sizes and forms that no model can serve."""
    bodies: list[dict[str, Any] | bytes] = (
        [b"[" * 500_000, b'{"prompt": NaN}', b"\xff\xfe", {"prompt": "A", "max_tokens": -1}, {"prompt": [1] * 100_000},
         {"prompt": "A " * 200_000}, {"prompt": "A", "n": 10**9}, {"prompt": ["A"] * 5000}, {"prompt": "\ud800"},
         {"prompt": "A", "stop": ["a" * 10**5]}, {"prompt": [10**12]}, {"prompt": {"a": 1}}, {"nothing": 1}]
    )  # fmt: skip
    async with connection(port) as (reader, writer):
        writer.write(request(chosen.choice(bodies)))
        return status_of(await reader.read(100))


async def rushes(port: int, chosen: random.Random) -> str:
    """150 requests at once."""
    bodies = [{"prompt": "A", "max_tokens": 4} for _ in range(150)]
    answers = await asyncio.gather(*(complete(port, body) for body in bodies), return_exceptions=True)
    statuses = [str(answer.status) if isinstance(answer, Answer) else "broken" for answer in answers]
    return " ".join(f"{status}*" for status in sorted({*statuses}))


async def connects_only(port: int, chosen: random.Random) -> str:
    """200 connections that say nothing."""
    pairs = [await asyncio.open_connection(PLACE, port) for _ in range(200)]
    ends = await asyncio.gather(*(reader.read(1) for reader, _ in pairs), return_exceptions=True)
    for _, writer in pairs:
        writer.close()
    return "closed" if all(end == b"" or isinstance(end, OSError) for end in ends) else "?"


BAD: dict[str, tuple[Callable[[int, random.Random], Awaitable[str]], float]] = {  # and seconds between two
    "leaves": (leaves, 1.0), "reads a byte a second": (reads_a_byte_a_second, 1.0), "never reads": (never_reads, 1.0),
    "sends half": (sends_half, 1.0), "drips": (drips, 1.0), "sends much": (sends_much, 5.0),
    "talks nonsense": (talks_nonsense, 0.5), "asks wrongly": (asks_wrongly, 0.5), "rushes": (rushes, 20.0),
    "connects only": (connects_only, 20.0),
}  # fmt: skip


def status_of(head: bytes) -> str:
    return head[9:12].decode() if head.startswith(b"HTTP/1.1 ") else "closed" if not head else "?"


async def bad(port: int, kind: str, counts: dict[str, int], end: float) -> None:
    """Be a bad client of one kind, again and again; counts: how it was answered."""
    client, pause = BAD[kind]
    chosen = random.Random(kind)
    while time.monotonic() < end:
        try:
            async with asyncio.timeout(max(1.0, end - time.monotonic())):
                met = await client(port, chosen)
        except TimeoutError:
            met = "still open at the end"
        except OSError:
            met = "closed"
        counts[met] = counts.get(met, 0) + 1
        await asyncio.sleep(pause)

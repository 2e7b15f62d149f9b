"""The server and clients that ask for too much, go away, are slow or hostile."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from runtime.model import Model
from tests.helpers.serving import Served, idle, post, serving, until

PROMPTS = ["The tide mill", "é – ", "A", "stones weighed a ton", "In 1785 it did : £ 40", "wheel"]


# --- too much ----------------------------------------------------------------------------------------------


def test_a_full_queue_is_429_and_nothing_that_was_admitted_is_lost(model: Model, slow: None) -> None:
    with serving(model, parallel=2, queue=3, max_texts=5) as served, ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(served.complete, prompt="The tide", max_tokens=20, temperature=0) for _ in range(5)]
        until(lambda: len(served.desk.orders) == 5)
        status, headers, body = served.ask("POST", "/v1/completions", {"prompt": "a"})
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["message"].startswith("the server is busy: 5 of at most 5 texts are under way")
        assert {one.result()[1]["choices"][0]["text"] for one in asked} == {model.generate("The tide", 20)}
        assert served.complete(prompt=["a"] * 5, max_tokens=1)[0] == 200
        assert served.complete(prompt=["a"] * 6, max_tokens=1)[0] == 400


def test_large_bodies_are_refused_before_they_are_read(served: Served) -> None:
    huge = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    status, _, body = served.ask("POST", "/v1/completions", huge)
    assert (status, json.loads(body)["error"]["message"]) == (413, "a request may have at most 1048576 bytes")
    with served.connect() as place:  # chunks do not tell their sum
        place.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                      b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        for _ in range(17):
            place.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")
        assert b" 413 " in place.recv(100)
    with served.connect() as place:
        place.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                      b"Content-Length: 99999999999999999999\r\n\r\n")  # fmt: skip
        assert b" 413 " in place.recv(100)
    with served.connect() as place:
        place.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000)
        assert b" 400 " in place.recv(100)
    until(lambda: not served.desk.bodies)


def test_bodies_together_have_a_limit(model: Model) -> None:
    with serving(model, max_body=1000) as served:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 990\r\n\r\n"
        )
        places = [served.connect() for _ in range(33)]
        for place in places:
            place.sendall(head + b" " * 980)
        until(lambda: served.desk.metrics.answers[429] >= 1)
        assert served.desk.bodies <= 32 * 1000
        for place in places:
            place.close()
        until(lambda: not served.desk.bodies)
        assert served.complete(prompt="a")[0] == 200


def test_too_many_connections_are_closed(model: Model) -> None:
    with serving(model, connections=3) as served:
        places = [served.connect() for _ in range(3)]
        until(lambda: len(served.server.server_state.connections) == 3)
        with pytest.raises((ConnectionError, http.client.BadStatusLine)):
            served.ask("GET", "/health")
        places.pop().close()
        until(lambda: len(served.server.server_state.connections) == 2)
        assert served.ask("GET", "/health")[0] == 200
        for place in places:
            place.close()


# --- clients that go, or are slow --------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [True, False])
def test_a_text_whose_client_has_gone_is_dropped(streamed: bool, model: Model, slow: None) -> None:
    with serving(model) as served:
        with served.connect() as place:
            place.sendall(post({"prompt": "The tide", "max_tokens": 50, "n": 3, "stream": streamed}))
            until(lambda: served.desk.metrics.new_tokens >= 3)
        until(lambda: idle(served))
        assert served.desk.metrics.new_tokens < 3 * 40
        assert served.desk.metrics.cancelled == 3
        assert served.desk.metrics.answers == {499: 1}


def test_a_waiting_text_whose_client_has_gone_is_never_begun(model: Model, slow: None) -> None:
    with serving(model, parallel=1) as served, ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.complete, prompt="The tide", max_tokens=30, temperature=0)
        until(lambda: served.desk.metrics.new_tokens >= 1)
        with served.connect() as place:
            place.sendall(post({"prompt": "A", "max_tokens": 50, "echo": True, "logprobs": 1}))
            until(lambda: len(served.desk.orders) == 3)
        assert first.result()[1]["usage"]["completion_tokens"] == 30
        until(lambda: idle(served))
        assert served.desk.metrics.new_tokens == 30


def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(model: Model) -> None:
    with serving(model, small_buffers=True, client_timeout=1.0) as served, served.connect(SO_RCVBUF=2048) as deaf:
        deaf.sendall(post({"prompt": "The tide", "max_tokens": 50, "n": 16, "logprobs": 5, "stream": True}))
        until(lambda: served.desk.metrics.new_tokens == 16 * 50)  # all of it is written
        assert not idle(served)  # it waits for the client
        assert served.complete(prompt="A", max_tokens=5)[0] == 200
        until(lambda: idle(served))
        until(lambda: not served.server.server_state.connections)


def test_a_client_that_reads_a_byte_at_a_time_gets_its_text(model: Model) -> None:
    with serving(model) as served, served.connect() as place:
        place.sendall(post({"prompt": "The tide", "max_tokens": 3, "temperature": 0}))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += place.recv(1)
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = b"".join(place.recv(1) for _ in range(length))
        assert json.loads(body)["choices"][0]["text"] == model.generate("The tide", 3)


def test_a_request_that_does_not_come_to_its_end(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.connections.IDLE", 1.0)
    with serving(model, client_timeout=1.0) as served:
        half, nothing, drip = served.connect(), served.connect(), served.connect()
        half.sendall(post({"prompt": "The tide"})[:-3])
        assert b" 408 " in half.recv(100)
        end = time.monotonic() + 10
        with suppress(OSError):
            while time.monotonic() < end:
                drip.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() < end
        assert nothing.recv(1) == b""
        until(lambda: not served.server.server_state.connections)
        assert served.complete(prompt="a")[0] == 200
        for place in (half, nothing, drip):
            place.close()


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00", b"\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\n\r\n",
     b"GET / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
)  # fmt: skip
def test_what_is_not_http_is_answered_and_closed(garbage: bytes, served: Served) -> None:
    with served.connect() as place:
        place.sendall(garbage + b"\r\n\r\n")
        assert place.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 415")
    assert served.complete(prompt="a", max_tokens=1)[0] == 200

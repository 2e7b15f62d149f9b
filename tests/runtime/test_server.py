"""The server as well-behaved clients see it, plain ones and the official one; what it says, and how it ends."""

from __future__ import annotations

import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import runtime
from dmpt_export.onnx.export import export_onnx
from quant.checkpoint import save_quantized
from runtime.errors import ModelError
from runtime.model import Model
from runtime.server.connections import Discreet, listen
from runtime.together import Together
from tests.helpers.serving import Served, events, idle, post, serving, until

PROMPTS = ["The tide mill", "é – ", "A", "stones weighed a ton", "In 1785 it did : £ 40", "wheel"]


def client_of(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key=key, max_retries=0, timeout=30)


# --- texts -------------------------------------------------------------------------------------------------


def test_each_of_32_clients_at_once_gets_what_generate_gives(served: Served) -> None:
    cases = [(f"{PROMPTS[n % 6]} {n}", 5 + n % 40, n % 2 == 0) for n in range(32)]

    def ask(case: tuple[str, int, bool]) -> str:
        prompt, most, streamed = case
        fields: dict[str, Any] = {"model": "tide", "prompt": prompt, "max_tokens": most, "temperature": 0}
        with client_of(served) as client:
            if streamed:
                return "".join(part.choices[0].text for part in client.completions.create(**fields, stream=True))
            return client.completions.create(**fields).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(ask, cases))
    assert got == [served.model.generate(prompt, most) for prompt, most, _ in cases]
    assert len(set(got)) > 20
    until(lambda: idle(served))


def test_the_official_client(served: Served) -> None:
    with client_of(served) as client:
        assert [entry.id for entry in client.models.list()] == ["tide"]
        assert client.models.retrieve("tide").owned_by == "dmpt-export"
        made = client.completions.create(
            model="tide", prompt=["The tide", "A mill"], max_tokens=6, n=2, seed=3, logprobs=2, temperature=0.9,
            echo=True, user="u",
        )  # fmt: skip
        with pytest.raises(openai.NotFoundError, match="does not exist: this server has 'tide'"):
            client.completions.create(model="gpt-4", prompt="a")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens") as caught:
            client.completions.create(model="tide", prompt=[1] * 65)
        with pytest.raises(openai.NotFoundError, match="no chat template"):
            client.chat.completions.create(model="tide", messages=[{"role": "user", "content": "a"}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert made.object == "text_completion"
    texts = [served.model.generate([prompt] * 2, 6, seed=3, temperature=0.9) for prompt in ("The tide", "A mill")]
    assert [choice.text for choice in made.choices] == [
        prompt + text for prompt, both in zip(("The tide", "A mill"), texts, strict=True) for text in both
    ]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.usage is not None
    prompts = sum(len(served.model.encode(prompt)) for prompt in ("The tide", "A mill"))
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (prompts, 24)
    assert made.usage.total_tokens == prompts + 24


def test_log_probs_are_the_models(served: Served) -> None:
    """Of an echoed prompt and of new tokens: those of scoring the whole text at once."""
    ids = served.model.encode("The tide mill")
    new = served.model.generate(ids, 5)
    _, answer = served.complete(prompt=ids, max_tokens=5, temperature=0, logprobs=3, echo=True)
    found = answer["choices"][0]["logprobs"]
    want = served.model.log_probs([*ids, *new])
    every = [*ids, *new]
    assert found["token_logprobs"][0] is None
    np.testing.assert_allclose(
        found["token_logprobs"][1:], [want[at, token] for at, token in enumerate(every[1:])], atol=1e-4
    )
    assert answer["choices"][0]["text"] == served.model.decode(every)
    for at, likely in enumerate(found["top_logprobs"][1:]):
        assert len(likely) in (3, 4)  # the token itself may be a further one
        np.testing.assert_allclose(sorted(likely.values())[-3:], np.sort(want[at])[-3:], atol=1e-4)
    _, only = served.complete(prompt=ids, max_tokens=0, logprobs=3, echo=True)
    assert only["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][: len(ids)]
    assert only["choices"][0]["finish_reason"] == "length"
    assert only["usage"]["completion_tokens"] == 0


def test_a_stream_has_the_parts_of_the_whole(served: Served) -> None:
    fields: dict[str, Any] = {
        "prompt": ["The tide", "é"],
        "n": 2,
        "max_tokens": 7,
        "seed": 5,
        "logprobs": 1,
        "echo": True,
    }
    _, whole = served.complete(**fields)
    status, headers, body = served.ask(
        "POST", "/v1/completions", {**fields, "stream": True, "stream_options": {"include_usage": True}}
    )
    *parts, last, end = events(body)
    assert (status, headers["content-type"], end) == (200, "text/event-stream; charset=utf-8", "[DONE]")
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(part["usage"] is None for part in parts)
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine] == [*[None] * (len(mine) - 1), choice["finish_reason"]]
        for field, values in choice["logprobs"].items():
            assert [value for part in mine for value in part["logprobs"][field]] == values
    echoed = served.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 0, "echo": True, "stream": True})[2]
    assert [part["choices"][0]["text"] for part in events(echoed)[:-1]] == ["a"]


def test_why_a_text_ends(served: Served, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(model.generate("The tide", 20))
    stop = text[6:9]
    _, answer = served.complete(prompt="The tide", max_tokens=20, temperature=0, stop=["\n\n\n", stop])
    assert answer["choices"][0]["text"] == text.partition(stop)[0]
    assert answer["choices"][0]["finish_reason"] == "stop"
    _, answer = served.complete(prompt=[5] * 64, max_tokens=30, temperature=0)  # the context is full
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (1, "length")
    third = model.generate(model.encode("The tide"), 20)[2]
    monkeypatch.setattr(model, "ends", frozenset([third]))
    _, answer = served.complete(prompt="The tide", max_tokens=20, temperature=0)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(("scheme", "exact"), [("int8-dynamic", False), ("int4", True)])
def test_texts_do_not_change_each_other_where_kernels_round_rows_together(
    scheme: str, exact: bool, tiny_dmpt: Path, tmp_path: Path
) -> None:
    """Or where texts must be exact: both schemes would change some of them in a batch."""
    save_quantized(tiny_dmpt, tmp_path / "quantized", scheme)
    export_onnx(tmp_path / "quantized", tmp_path / "device", verify=False)
    with runtime.load(tmp_path / "device", threads=1) as model, serving(model, exact=exact) as served:
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(served.complete, prompt=text, max_tokens=25, temperature=0) for text in PROMPTS]
            got = [one.result()[1]["choices"][0]["text"] for one in asked]
        assert got == [model.generate(text, 25) for text in PROMPTS]


def test_a_model_without_a_tokenizer(model: Model, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.generate([5, 6], 4)
    monkeypatch.setattr(model, "codec", None)
    monkeypatch.setattr(served.desk.names, "codec", None)
    _, answer = served.complete(prompt=[5, 6], max_tokens=4, temperature=0, logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert served.complete(prompt="a")[1]["error"]["message"].endswith("no tokenizer: give token ids instead of text")
    assert served.complete(prompt=[5], stop="a")[1]["error"]["param"] == "stop"


# --- who may ask -------------------------------------------------------------------------------------------


def test_keys(model: Model) -> None:
    with serving(model, keys=("open", "sesame")) as served:
        assert [served.ask("GET", "/v1/models", Authorization=f"Bearer {key}")[0] for key in ("open", "sesame")] == [
            200
        ] * 2
        wrong = ["Bearer ope", "Bearer opens", "Bearer ", "open", "Basic open", "Bearer open sesame"]
        assert [served.ask("GET", "/v1/models", Authorization=value)[0] for value in wrong] == [401] * len(wrong)
        status, headers, body = served.ask("POST", "/v1/completions", {"prompt": "a"})
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert served.ask("GET", "/metrics")[0] == 401
        assert [served.ask("GET", path)[0] for path in ("/health", "/health/live")] == [200, 200]
        with client_of(served, "sesame") as client:
            assert client.completions.create(model="tide", prompt="a", max_tokens=1).choices
        with client_of(served, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(model="tide", prompt="a", max_tokens=1)


def test_pages_of_other_origins(model: Model, served: Served) -> None:
    """No origin unless asked; a form of a page, which needs no leave, is refused by its type."""
    preflight = {"Origin": "https://page", "Access_Control_Request_Method": "POST"}
    assert served.ask("OPTIONS", "/v1/completions", **preflight)[0] == 405
    _, headers, _ = served.ask("GET", "/v1/models", Origin="https://page")
    assert not [name for name in headers if name.startswith("access-control")]
    assert served.ask("POST", "/v1/completions", b'{"prompt": "a"}', Content_Type="text/plain")[0] == 415
    with serving(model, keys=("k",), origins=("https://page",)) as open_to:
        status, headers, _ = open_to.ask("OPTIONS", "/v1/completions", **preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://page")
        assert open_to.ask("OPTIONS", "/v1/completions", **(preflight | {"Origin": "https://other"}))[0] == 400
        status, headers, _ = open_to.ask("POST", "/v1/completions", {"prompt": "a"}, Origin="https://page")
        assert (status, headers["access-control-allow-origin"]) == (401, "https://page")


def test_names_that_a_page_made_point_here_are_refused(model: Model) -> None:
    with serving(model, hosts={"localhost", "mill.example"}) as served:
        assert [served.ask("GET", "/v1/models", Host=host)[0] for host in ("localhost:80", "mill.example", "evil")] == [
            200, 200, 403,
        ]  # fmt: skip
        assert served.ask("GET", "/health", Host="10.0.0.7")[0] == 200  # probes use the address


# --- what is said ------------------------------------------------------------------------------------------


def test_the_log_has_counts_and_no_texts(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    _, answer = served.complete(prompt="The secret tide", max_tokens=9, temperature=0)
    served.complete(prompt="The secret tide", secret_field=1)
    served.ask("GET", "/health")
    served.ask("GET", "/nowhere%0A2026-01-01%20forged")

    said = "The secret tide"

    def fail(self: Together) -> Any:
        raise ValueError(said)

    monkeypatch.setattr(Together, "step", fail)
    assert served.complete(prompt="The secret tide")[0] == 500
    records = [record for record in caplog.records if record.name in ("dmpt_export.server", "uvicorn.error")]
    for record in records:
        record.exc_text = None  # pytest's handler has formatted it
    lines = [Discreet("%(message)s").format(record) for record in records]
    (first,) = [line for line in lines if "new 9" in line]
    assert f"POST /v1/completions 200 prompt {answer['usage']['prompt_tokens']}, new 9, " in first
    assert not [line for line in lines if "secret" in line or answer["choices"][0]["text"] in line or "/health" in line]
    assert [line for line in lines if "/nowhere\\n2026-01-01 forged 404" in line]
    assert [line for line in lines if line.startswith("the model failed") and line.endswith("ValueError")]


def test_metrics_count_what_happened(model: Model) -> None:
    with serving(model) as served:
        _, first = served.complete(prompt="The tide", max_tokens=4, temperature=0)
        served.complete(prompt="a", max_tokens=-1)
        status, headers, body = served.ask("GET", "/metrics")
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        values = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#"))
    assert values['dmpt_requests_total{status="200"}'] == values['dmpt_requests_total{status="400"}'] == "1"
    assert values["dmpt_prompt_tokens_total"] == str(first["usage"]["prompt_tokens"])
    assert (values["dmpt_new_tokens_total"], values["dmpt_texts_running"], values["dmpt_texts_waiting"]) == (
        "4",
        "0",
        "0",
    )
    assert values["dmpt_request_seconds_count"] == "2"
    assert values["dmpt_first_token_seconds_count"] == "1"
    assert int(values["dmpt_steps_total"]) >= 4
    assert float(values["process_resident_memory_bytes"]) > 1e7


def test_a_failing_model_costs_the_texts_of_that_step_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch, slow: None
) -> None:
    with serving(model, parallel=2) as served, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(served.complete, prompt="The tide", max_tokens=30, temperature=0) for _ in range(3)]
        until(lambda: served.desk.metrics.new_tokens >= 2)
        with monkeypatch.context() as patch:
            patch.setattr(Together, "step", lambda self: (_ for _ in ()).throw(ModelError("ONNX Runtime failed")))
            until(lambda: len(served.desk.orders) <= 1)
        answers = [one.result() for one in asked]
        assert sorted(status for status, _ in answers)[-2:] == [500, 500]
        assert served.ask("GET", "/health")[0] == 200
        assert served.complete(prompt="The tide", max_tokens=9, temperature=0)[1]["choices"][0][
            "text"
        ] == model.generate("The tide", 9)
    body = next(body for status, body in answers if status == 500)
    assert (body["error"]["type"], body["error"]["code"]) == ("server_error", "model_failed")


def test_an_error_in_a_stream_is_its_last_event(model: Model, monkeypatch: pytest.MonkeyPatch, slow: None) -> None:
    with serving(model) as served, client_of(served) as client:
        stream = client.completions.create(model="tide", prompt="a", max_tokens=40, stream=True)
        next(iter(stream))
        monkeypatch.setattr(Together, "step", lambda self: (_ for _ in ()).throw(ModelError("ONNX Runtime failed")))
        with pytest.raises(openai.APIError, match="the model failed while it wrote this text"):
            list(stream)


# --- the end -----------------------------------------------------------------------------------------------


def test_at_the_end_running_texts_finish_and_nothing_new_is_taken(model: Model, slow: None) -> None:
    with serving(model, parallel=2) as served, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(served.complete, prompt="The tide", max_tokens=25, temperature=0) for _ in range(4)]
        until(lambda: len(served.desk.orders) == 4)
        served.stop()
        status, headers, _ = served.ask("POST", "/v1/completions", {"prompt": "a"})
        assert (status, headers["retry-after"]) == (503, "1")
        status, _, body = served.ask("GET", "/health")
        assert (status, json.loads(body)) == (503, {"status": "shutting down"})
        assert served.ask("GET", "/health/live")[0] == 200
        assert {one.result()[1]["choices"][0]["text"] for one in asked} == {model.generate("The tide", 25)}
        served.thread.join(10)
        assert not served.thread.is_alive()
        with pytest.raises(OSError):
            served.connect()


def test_what_does_not_finish_in_time_ends_cleanly(model: Model, slow: None) -> None:
    """Running texts with what there is of them, waiting ones with an error."""
    with serving(model, parallel=1, grace=0.5) as served, ThreadPoolExecutor(3) as pool:
        body = {"prompt": "The tide", "max_tokens": 60, "temperature": 0, "stream": True}
        first = pool.submit(served.ask, "POST", "/v1/completions", body)
        until(lambda: served.desk.metrics.new_tokens >= 1)
        second = pool.submit(served.ask, "POST", "/v1/completions", body)
        third = pool.submit(served.complete, prompt="The tide", max_tokens=60)
        until(lambda: len(served.desk.orders) == 3)
        served.stop()
        *parts, end = events(first.result()[2])
        text = "".join(part["choices"][0]["text"] for part in parts)
        assert (parts[-1]["choices"][0]["finish_reason"], end) == ("length", "[DONE]")
        whole = str(model.generate("The tide", 60))
        assert whole.startswith(text)
        assert 0 < len(text) < len(whole)
        (error,) = events(second.result()[2])
        assert error["error"]["code"] == third.result()[1]["error"]["code"] == "shutting_down"
        assert third.result()[0] == 503


def test_a_client_that_does_not_read_cannot_keep_the_server_alive(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.connections.LAST", 1.0)
    with serving(model, small_buffers=True, grace=0.2) as served, served.connect(SO_RCVBUF=2048) as deaf:
        deaf.sendall(post({"prompt": "The tide", "max_tokens": 50, "n": 16, "logprobs": 5, "stream": True}))
        until(lambda: served.desk.metrics.new_tokens == 16 * 50)
        served.stop()
        served.thread.join(10)
        assert not served.thread.is_alive()


def test_listening_takes_the_port(served: Served) -> None:
    with pytest.raises(OSError):
        listen("127.0.0.1", served.port)
    with pytest.raises(socket.gaierror):
        listen("no such name", 80)


def test_no_request_is_forgotten_when_the_model_fails_in_the_turn_that_drops_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, slow: None
) -> None:
    """One text runs, one waits; the client of the latter goes, and the model fails before that is noted."""
    with serving(model, parallel=1) as served, ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.complete, prompt="The tide", max_tokens=60)
        until(lambda: served.desk.metrics.new_tokens >= 1)
        with served.connect() as place:
            place.sendall(post({"prompt": "A"}))
            until(lambda: len(served.desk.writer.waiting) == 1)
            step = Together.step

            def fail(self: Together) -> Any:
                if any(job.cancelled for job in served.desk.orders):
                    monkeypatch.setattr(Together, "step", step)
                    raise ModelError("ONNX Runtime failed")
                return step(self)

            monkeypatch.setattr(Together, "step", fail)
        assert first.result()[0] == 500
        until(lambda: idle(served))


def test_memory_of_texts_is_given_back_after_a_while(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.writer.KEPT", 0.3)
    with serving(model) as served:
        first = served.desk.writer.together
        texts = [served.complete(prompt="The tide", max_tokens=5, temperature=0)[1]["choices"][0]["text"] for _ in "ab"]
        assert served.desk.writer.together is first
        until(lambda: served.desk.writer.together is not first)
        texts.append(served.complete(prompt="The tide", max_tokens=5, temperature=0)[1]["choices"][0]["text"])
    assert texts == [model.generate("The tide", 5)] * 3

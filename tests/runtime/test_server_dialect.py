"""What a completion may ask for, what its answer looks like, and what passes the guard; without a socket."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runtime
from runtime.model import Model
from runtime.server.answers import Choice, Names
from runtime.server.connections import Discreet, Watch
from runtime.server.dialect import encode, read_json, read_request
from runtime.server.errors import Refused
from runtime.server.guard import host_of
from runtime.server.limits import Bounds
from runtime.server.metrics import Histogram
from runtime.server.writer import Scores, Written
from runtime.writing import Token

BOUNDS = Bounds(max_tokens=50, max_texts=4)


@pytest.fixture(scope="module")
def model(dual_device: Path) -> Any:
    with runtime.load(dual_device, threads=1) as loaded:
        yield loaded


# --- fields -------------------------------------------------------------------------------------------


def test_openais_defaults() -> None:
    asked = read_request({"prompt": "a"}, "tide", BOUNDS)
    assert asked.prompts == ["a"]
    assert (asked.limits.max_new_tokens, asked.sampling.heat, asked.n) == (16, 1.0, 1)
    assert [asked.stream, asked.echo, asked.scores, asked.usage] == [False] * 4
    assert asked.limits.logprobs is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (None, [""]),
        ("", [""]),
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_forms_of_prompts(prompt: Any, prompts: Any) -> None:
    assert read_request({"prompt": prompt}, "tide", BOUNDS).prompts == prompts


def test_every_field_arrives() -> None:
    asked = read_request(
        {
            "model": "tide", "prompt": [1], "max_tokens": 9, "temperature": 0, "top_p": 0.5, "n": 2, "best_of": 2,
            "stream": True, "stream_options": {"include_usage": True}, "logprobs": 3, "echo": True, "stop": ["x", "y"],
            "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {"7": -100}, "seed": 5, "user": "u",
            "suffix": None, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2,
        },
        "tide", BOUNDS,
    )  # fmt: skip
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 4, 0.1)
    assert (sampling.repetition_penalty, sampling.seed, sampling.logit_bias) == (1.2, 5, {7: -100.0})
    assert (asked.limits.max_new_tokens, asked.limits.stops, asked.limits.logprobs, asked.n) == (9, ["x", "y"], 3, 2)
    assert asked.stream
    assert asked.usage
    assert asked.echo
    assert asked.scores


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"max_token": 5}, "unrecognized request argument: 'max_token'", "max_token"),
    ({"model": 5}, "the model '5' does not exist: this server has 'tide'", "model"),
    ({"prompt": 7}, "prompt must be a string", "prompt"),
    ({"prompt": []}, "prompt must be a string", "prompt"),
    ({"prompt": ["a", 1]}, "all strings, all token ids", "prompt"),
    ({"prompt": [[1], []]}, "none of them empty", "prompt"),
    ({"prompt": [True]}, "all strings, all token ids", "prompt"),
    ({"prompt": [1.0]}, "all strings, all token ids", "prompt"),
    ({"prompt": [1 << 80]}, "all strings, all token ids", "prompt"),
    ({"prompt": ["a"] * 3, "n": 2}, "3 prompts with n 2 are 6 texts, and one request may have 4", "prompt"),
    ({"n": 0}, "n must be a whole number from 1 to 4, not 0", "n"),
    ({"n": 5}, "n must be a whole number from 1 to 4, not 5", "n"),
    ({"n": True}, "n must be a whole number", "n"),
    ({"best_of": 2}, "best_of must equal n", "best_of"),
    ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 50, not 0", "max_tokens"),
    ({"max_tokens": 51}, "max_tokens must be a whole number from 1 to 50, not 51", "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens must be a whole number from 1 to 50, not str", "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens must be a whole number", "max_tokens"),
    ({"logprobs": 6}, "logprobs must be a whole number from 0 to 5, not 6", "logprobs"),
    ({"temperature": -1}, "temperature -1 must be", "temperature"),
    ({"temperature": "hot"}, "temperature 'hot' must be", "temperature"),
    ({"top_p": 0}, "top_p 0 must be", "top_p"),
    ({"top_k": 0}, "top_k 0 must be", "top_k"),
    ({"min_p": 2}, "min_p 2 must be", "min_p"),
    ({"seed": -1}, "seed -1 must be", "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty 0 must be", "repetition_penalty"),
    ({"stop": ["a"] * 5}, "stop must be a string or a list of at most 4", "stop"),
    ({"stop": [""]}, "a stop must be a string of 1 to 500 characters", "stop"),
    ({"stop": "a" * 501}, "a stop must be a string of 1 to 500 characters", "stop"),
    ({"stop": 3}, "stop must be a string or a list", "stop"),
    ({"stream": 1}, "stream must be true or false", "stream"),
    ({"echo": "yes"}, "echo must be true or false", "echo"),
    ({"stream_options": {"include_usage": True}}, "stream_options is for stream: true", "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options may have include_usage", "stream_options"),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
    ({"frequency_penalty": "0"}, "frequency_penalty is not supported", "frequency_penalty"),
    ({"suffix": "b"}, "suffix is not supported", "suffix"),
    ({"logit_bias": [1]}, "logit_bias must map at most 1024", "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias must map token ids to numbers", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias must map token ids to numbers", "logit_bias"),
    ({"logit_bias": {"1": 101}}, "from -100 to 100", "logit_bias"),
    ({"logit_bias": {"1": None}}, "from -100 to 100", "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "at most 1024 token ids", "logit_bias"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message", "param"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_fields_are_named(fields: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(Refused) as caught:
        read_request(fields, "tide", BOUNDS)
    assert message in str(caught.value)
    assert caught.value.status == (404 if param == "model" else 400)
    error = caught.value.body["error"]
    assert (error["message"], error["param"]) == (str(caught.value), param)
    assert error["type"] == ("not_found_error" if param == "model" else "invalid_request_error")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[1]", b'"a"', b'{"n": NaN}', b"[" * 200_000, b'{"n": ' + b"9" * 5000 + b"}", b"{'a': 1}"],
)
def test_bodies_that_are_no_json_objects(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        read_json(body)
    assert caught.value.status == 400


WORDS = st.sampled_from(["", "a", "7", "include_usage", "é", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["prompt", "max_tokens", "n", "best_of", "stream", "stream_options", "logprobs", "echo", "stop", "logit_bias",
          "presence_penalty", "suffix", "user", "temperature", "top_p", "top_k", "min_p", "seed"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_nothing_that_is_json_breaks_the_reading(fields: dict[str, Any]) -> None:
    statuses = {200}
    try:
        asked = read_request(read_json(json.dumps(fields).encode()), "tide", BOUNDS)
    except Refused as error:
        statuses = {error.status, 200}
    else:
        assert 1 <= len(asked.prompts) * asked.n <= BOUNDS.max_texts
        assert asked.limits.max_new_tokens <= 50
    assert statuses <= {200, 400, 404}


# --- prompts ------------------------------------------------------------------------------------------


def test_prompts_become_ids(model: Model) -> None:
    asked = read_request({"prompt": ["The tide", ""]}, "tide", BOUNDS)
    assert [ids.tolist() for ids in encode(model, asked)] == [model.encode("The tide"), [model.end_of_text]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 65, "this model's maximum context length is 64 tokens, and the prompt has 65 tokens: shorten it"),
        ("é" * 70, "this model's maximum context length is 64 tokens, and the prompt has "),
        ("wheel " * 2000, "this model's maximum context length is 64 tokens, and the prompt has more than 128 tokens"),
        ("a" * (64 * 256 + 1), "the prompt has 16385 bytes, which are more than 16384"),
        ([300], "unknown token id 300 at position 0: the vocabulary has ids 0 to 299"),
        ([-1], "unknown token id -1"),
        ("\ud800", "not valid UTF-8"),
        (["a", "\ud800"], "prompt 2 of 2: the text is not valid UTF-8"),
    ],
)
def test_prompts_that_the_model_cannot_read(prompt: Any, message: str, model: Model) -> None:
    with pytest.raises(Refused, match=message) as caught:
        encode(model, read_request({"prompt": prompt}, "tide", BOUNDS))
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    assert (caught.value.code == "context_length_exceeded") == ("context" in message or "bytes" in message)


def test_a_biased_token_that_the_vocabulary_lacks(model: Model) -> None:
    with pytest.raises(Refused, match="this model's tokens are 0 to 299"):
        encode(model, read_request({"prompt": "a", "logit_bias": {"300": 1}}, "tide", BOUNDS))


# --- choices ------------------------------------------------------------------------------------------


def written(model: Model, text: str) -> list[Written]:
    """A text as if the model had written it, with made-up log-probs."""
    assert model.codec is not None
    streamer, steps = model.codec.streamer(), []
    for place, token in enumerate(model.encode(text)):
        top = ((token, -0.5), (token + 1, -1.0))
        steps.append(Written(Token(token, streamer.push(token), "left", 0, -0.5, top), None))
        assert place < 60
    return [*steps[:-1], Written(steps[-1].token, "max_new_tokens")]


def test_parts_of_a_choice_join_to_the_whole(model: Model) -> None:
    """Offsets point at each token in the text, which has characters of several bytes."""
    steps, names = written(model, "tide é – mill"), Names(model.codec)
    whole = Choice(model, names, 0, True).part(steps)
    assert (whole["text"], whole["finish_reason"]) == ("tide é – mill", "length")
    choice = Choice(model, names, 0, True)
    parts = [choice.part([step]) for step in steps]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [part["finish_reason"] for part in parts] == [*[None] * (len(steps) - 1), "length"]
    for field, values in whole["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][field]] == values
    assert whole["logprobs"]["token_logprobs"] == [-0.5] * len(steps)
    for name, offset in zip(whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"], strict=True):
        assert name.startswith("bytes:") or whole["text"][offset:].startswith(name)
    assert any(name.startswith("bytes:\\x") for name in whole["logprobs"]["tokens"])


def test_an_echoed_prompt_has_log_probs_but_for_its_first_token(model: Model) -> None:
    ids = model.encode("The tide")
    choice = Choice(model, Names(model.codec), 0, True)
    choice.prompt = ("The tide", ids, Scores([None, *[-1.0] * (len(ids) - 1)], [(), *[((5, -0.1),)] * (len(ids) - 1)]))
    part = choice.part(written(model, " mill"))
    logprobs, names = part["logprobs"], Names(model.codec)
    assert part["text"] == "The tide mill"
    assert logprobs["token_logprobs"][: len(ids)] == [None, *[-1.0] * (len(ids) - 1)]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {names(5): -0.1, names(ids[1]): -1.0}
    assert "".join(logprobs["tokens"]) == "The tide mill"
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:n])) for n in range(len(logprobs["tokens"]))]


def test_names_of_tokens(model: Model) -> None:
    names = Names(model.codec)
    assert model.end_of_text is not None
    assert names(model.end_of_text) == "<|endoftext|>"
    assert names(299_999) == "token_id:299999"
    assert Names(None)(7) == "token_id:7"


# --- the rest -------------------------------------------------------------------------------------------


def test_hosts() -> None:
    found = {"a:1": "a", "A": "a", "[::1]:80": "[::1]", "[::1]": "[::1]", "::1": "::1", "": "", "a:b": "a:b"}
    assert {header: host_of(header) for header in found} == found


def test_a_histogram_counts_all_values_up_to_each_bound() -> None:
    histogram = Histogram()
    for value in (0.001, 0.01, 0.02, 200.0):
        histogram.observe(value)
    lines = histogram.lines("x")
    assert lines[:3] == ['x_bucket{le="0.01"} 2', 'x_bucket{le="0.03"} 3', 'x_bucket{le="0.1"} 3']
    assert lines[-4:] == ['x_bucket{le="100.0"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 200.031000", "x_count 4"]


def test_tracebacks_in_the_log_quote_nobody() -> None:
    said = "a secret\n  in two lines"
    try:
        try:
            raise KeyError(said)
        except KeyError:
            raise ValueError(said) from None
    except ValueError as error:
        error.__suppress_context__ = False
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), (type(error), error, error.__traceback__))
    text = Discreet().format(record)
    assert text.startswith("failed\nTraceback")
    assert text.endswith("\nKeyError, then\n" + text.rpartition("KeyError, then\n")[2])
    assert text.endswith("ValueError")
    assert text.count("in test_tracebacks_in_the_log_quote_nobody\n") == 2
    assert "secret" not in text


class FakeTransport:
    def __init__(self) -> None:
        self.waiting, self.aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


class FakeConnection(SimpleNamespace):
    __hash__ = object.__hash__


def connection(**fields: Any) -> Any:
    conn = SimpleNamespace(their_state=h11.DONE)
    return FakeConnection(transport=FakeTransport(), cycle=None, conn=conn, timeout_keep_alive_task=None, **fields)


def test_the_watch_ends_each_kind_of_delay_in_its_time() -> None:
    silent, busy, idle, talking, deaf = (connection() for _ in range(5))
    busy.cycle = SimpleNamespace(response_complete=False)
    idle.cycle = talking.cycle = SimpleNamespace(response_complete=True)
    idle.timeout_keep_alive_task = object()
    talking.conn.their_state = h11.SEND_BODY
    deaf.cycle, deaf.transport.waiting = busy.cycle, 1
    everyone, watch, ended = [silent, busy, idle, talking, deaf], Watch(30), {}
    for now in range(100):
        watch.look([one for one in everyone if not one.transport.aborted], now)
        ended |= {
            everyone.index(one): now for one in everyone if one.transport.aborted and everyone.index(one) not in ended
        }
    assert ended == {0: 11, 3: 3, 4: 31}


def test_a_client_that_reads_in_time_stays() -> None:
    slow, watch = connection(), Watch(30)
    slow.cycle = SimpleNamespace(response_complete=False)
    for now in range(200):
        slow.transport.waiting = 0 if now % 25 == 0 else 100
        watch.look([slow], now)
    assert not slow.transport.aborted

"""The same text in every kind of file and in a dataset gives the same lines and tokens; clear errors."""

from __future__ import annotations

import gzip
import importlib.util
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpt_export.cli.main import main
from tests.helpers.fake_hub import FakeDataset, FakeHub, write_wikitext
from training.errors import InputError
from training.text import sources, windows
from training.text.tokenizer import load_tokenizer
from training.text.zstd import ZstdReader

zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [" = One =\n", "", "naïve – 東京 🎈\nits second line", "  \n", '"quotes", \\ and \u2028 inside', "last"]
LINES = ["= One =", "naïve – 東京 🎈", "its second line", TEXTS[4], "last"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def table(texts: list[Any], field: str = "text", kind: Any = None) -> Any:
    return pa.table({"id": list(range(len(texts))), field: pa.array(texts, kind)})


def write(path: Path, texts: list[str], field: str = "text") -> Path:
    """Write `texts` in the form that the file name implies."""
    kind = sources.kind_of(path)
    if kind == "parquet":
        parquet.write_table(table(texts, field), path, row_group_size=2)
    else:
        content = jsonl(texts, field) if kind == "jsonl" else "\n".join(texts).encode()
        path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](content))
    return path


NAMES = [f"{stem}{suffix}" for stem in ("text.txt", "text.jsonl") for suffix in PACK]
NAMES += ["text", "text.raw", "text.json", "text.ndjson", "TEXT.JSONL", "text.parquet", "wiki.test.raw.zst"]


# --- the same lines everywhere ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_lines(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, TEXTS)
    assert list(sources.read_lines(path)) == LINES
    assert [line.strip() for line in sources.read_text(path).split("\n") if line.strip()] == LINES


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.parquet"])
def test_another_field_can_be_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, TEXTS, field="body")
    assert list(sources.read_lines(path, field="body")) == LINES
    with pytest.raises(InputError, match=r"'text': choose one of id, body with text_field"):
        list(sources.read_lines(path))


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_text_columns_of_all_types(kind: str, tmp_path: Path) -> None:
    types = {"string_view": pa.string_view(), "dictionary": pa.dictionary(pa.int32(), pa.string())}
    parquet.write_table(table(TEXTS, kind=types.get(kind) or getattr(pa, kind)()), tmp_path / "a.parquet")
    assert list(sources.read_lines(tmp_path / "a.parquet")) == LINES


def test_large_parquet_files_are_read_in_pieces(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(2 * sources.ROWS_AT_ONCE + 7)]
    write(tmp_path / "a.parquet", lines)
    assert list(sources.read_lines(tmp_path / "a.parquet")) == lines


def test_nulls_and_blank_lines_are_no_text(tmp_path: Path) -> None:
    parquet.write_table(table([None, "one", None]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": null}\n\n{"text": "one"}\r\n \n', encoding="utf-8")
    for name in ("a.parquet", "a.jsonl"):
        assert list(sources.read_lines(tmp_path / name)) == ["one"]


def test_tokens_are_equal_and_cached_by_content_kind_and_field(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer, cache = load_tokenizer(tokenizer_folder), tmp_path / "cache"
    wanted = [token for line in LINES for token in [*tokenizer.encode(line).ids, 0]]
    for name in ("a.txt", "a.txt.zst", "a.jsonl", "a.parquet"):
        path = write(tmp_path / name, TEXTS)
        assert windows.encode_lines(path, tokenizer, 0).tolist() == wanted
        assert windows.token_cache([path], tokenizer, 0, cache).tolist() == wanted
    assert len(list(cache.glob("*.bin"))) == 4
    (tmp_path / "a.jsonl").rename(tmp_path / "b.ndjson")
    windows.token_cache([tmp_path / "b.ndjson"], tokenizer, 0, cache)
    assert len(list(cache.glob("*.bin"))) == 4  # neither name nor date
    (tmp_path / "b.ndjson").rename(tmp_path / "b.txt")  # the same bytes, read as plain text
    assert len(windows.token_cache([tmp_path / "b.txt"], tokenizer, 0, cache)) > len(wanted)
    (tmp_path / "c.jsonl").write_text('{"text": "one", "body": "two"}\n')
    one, two = (windows.token_cache([tmp_path / "c.jsonl"], tokenizer, 0, cache, field) for field in ("text", "body"))
    assert (one.tolist(), two.tolist()) == ([*tokenizer.encode("one").ids, 0], [*tokenizer.encode("two").ids, 0])


# --- zstd -------------------------------------------------------------------------------------------


@given(
    parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    chunk=st.integers(1, 50),
    sized=st.booleans(),
)
def test_zstd_frames_one_after_another(parts: list[bytes], chunk: int, sized: bool) -> None:
    import io
    from unittest.mock import patch

    compressor = zstandard.ZstdCompressor(write_content_size=sized)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a frame that readers must skip
    packed = skippable.join(compressor.compress(part) for part in parts)
    with patch("training.text.zstd.CHUNK", chunk):
        assert io.BufferedReader(ZstdReader(io.BytesIO(packed))).read() == b"".join(parts)


def test_a_cut_zstd_file_is_noticed_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = zstandard.ZstdCompressor().compress(b"some text\n" * 5) * 2
    path = tmp_path / "cut.zst"
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        if length == len(whole) // 2:  # exactly one frame
            assert len(list(sources.read_lines(path))) == 5
            continue
        with pytest.raises(InputError, match=r"cut\.zst is damaged"):
            list(sources.read_lines(path))


def test_files_packed_with_a_long_window_can_be_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # no size: the window is stated
    (tmp_path / "long.zst").write_bytes(packer.compress(b"one\n") + packer.flush())
    assert list(sources.read_lines(tmp_path / "long.zst")) == ["one"]


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zst", b"no zstd at all", "is damaged"),
        ("a.zst", b"", "is empty"),
        ("a.txt.zst", PACK[".zst"](b"fine\n\xff\n"), r"not UTF-8: line 2, byte 0 \(0xff\)"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", jsonl(["", " \n"]), "is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON .*one object per line"),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', "line 3 is not a JSON object but a list"),
        ("a.jsonl", b'"b"\n', "line 1 is not a JSON object but a str"),
        ("a.json", b'[\n{"text": "a"}\n]', "line 1 is not JSON .*one object per line"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no field 'text': choose one of body"),
        ("a.jsonl", b"{}\n", "line 1 has no field 'text': it has none"),
        ("a.jsonl", b'{"text": ["a"]}\n', "line 1: 'text' is list, not text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: .*surrogate"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8: line 1"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "is damaged"),
        ("a.parquet", b"PAR1 and then nothing of the kind", "is damaged or not Parquet"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "unpack it first"),
        ("a.parquet", "cut", "is damaged or not Parquet"),
        ("a.parquet", table(["a"], field="body"), "no column 'text': choose one of id, body"),
        ("a.parquet", table(["", " "]), "is empty"),
        ("a.parquet", table([1, 2]), "row 1: 'text' is int, not text"),
        ("a.parquet", table([["a"]]), "row 1: 'text' is list, not text"),
        ("a.parquet", table([None, b"a"]), "row 2: 'text' is bytes, not text"),
    ],
)
def test_bad_data_is_one_line_that_says_where(
    name: str, content: Any, message: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        path.write_bytes(write(tmp_path / "whole.parquet", LINES * 50).read_bytes()[:-30])
    else:
        parquet.write_table(content, path)
    for read in (list_lines, sources.read_text):
        with pytest.raises(InputError, match=message) as caught:
            read(path)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert main(["eval", str(tiny_gpt2), "--data", str(path)]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def list_lines(path: Path) -> list[str]:
    return list(sources.read_lines(path))


def test_text_that_is_not_utf8_in_a_parquet_file(tmp_path: Path) -> None:
    wrong = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], "<i4")), pa.py_buffer(b"\xff")])
    parquet.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet is not UTF-8 in column 'text'"):
        list_lines(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "library"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow"), ("wikitext-103", "datasets")]
)
@pytest.mark.parametrize("verb", ["train", "eval", "compare"])
def test_a_missing_library_is_said_at_once(
    verb: str, name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if library != "datasets":
        Path(name).touch()
    monkeypatch.setattr(sources, "find_spec", lambda wanted: None if wanted == library else True)
    line = {"train": ["train", "no-model", "out"], "eval": ["eval", "no-model"], "compare": ["compare", "no-model"]}
    assert main([*line[verb], "--data", name]) == 3  # before the model is looked for
    err = capsys.readouterr().err
    assert err.endswith(f"needs {library}: {sources.INSTALL}\n")
    assert err.count("\n") == 1


# --- hub datasets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wikitext-103", True),
        ("roneneldan/TinyStories", True),
        ("owner/name.v2:train", True),
        ("owner/name:config-1.0:test[:1%]", True),
        ("train.txt", False),
        ("data/train.txt", False),
        ("wiki.train.raw", False),
        ("a/b/c", False),
        ("/none/such", False),
        ("./train", True),  # a Path forgets the dot; the error then names both possibilities
        ("data/train.jsonl.zst", False),
        ("wikitext-2:test[", False),
        ("", False),
    ],
)
def test_what_can_be_a_dataset(name: str, expected: bool) -> None:
    assert sources.is_dataset(name) is expected


def test_a_file_wins_over_a_dataset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wikitext-103").write_text("mine\n")
    assert list_lines(Path("wikitext-103")) == ["mine"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    return FakeHub.install(monkeypatch, FakeDataset({"text": TEXTS}))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("wikitext-103", ("Salesforce/wikitext", "wikitext-103-raw-v1", "train")),
        ("wikitext-103:test", ("Salesforce/wikitext", "wikitext-103-raw-v1", "test")),
        ("wikitext-2:train[:10%]", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train[:10%]")),
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:en:validation", ("owner/name", "en", "validation")),
    ],
)
def test_a_datasets_name_says_configuration_and_split(
    name: str, call: tuple[str, str | None, str], hub: FakeHub
) -> None:
    assert list_lines(Path(name)) == LINES
    assert hub.calls == [call]


def test_the_cache_knows_a_datasets_content(hub: FakeHub, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer, cache = load_tokenizer(tokenizer_folder), tmp_path / "cache"
    first = windows.token_cache(["wikitext-103"], tokenizer, 0, cache)
    assert first.tolist() == windows.encode_lines("\n".join(TEXTS), tokenizer, 0).tolist()
    windows.token_cache(["owner/the-same"], tokenizer, 0, cache)
    assert len(list(cache.iterdir())) == 1
    hub.answer = FakeDataset({"text": [*TEXTS[:-1], "las", "t"]})
    windows.token_cache(["wikitext-103"], tokenizer, 0, cache)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ConnectionError("no route\nto host"), "hub cannot be reached to look for a dataset owner/name"),
        (FileNotFoundError("Dataset 'owner/name' doesn't exist"), r"does not provide .*doesn't exist"),
        (ValueError('Unknown split "test"'), "does not provide .*Unknown split"),
        (RuntimeError("Dataset scripts are no longer supported"), "does not provide .*scripts"),
        (FakeDataset({"id": [1], "body": ["a"]}), "has no column 'text': choose one of id, body with text_field"),
        (FakeDataset({"text": ["a", 5]}), "dataset owner/name, row 2: 'text' is int"),
    ],
)
def test_what_the_hub_answers_is_one_line(answer: Any, message: str, hub: FakeHub) -> None:
    hub.answer = answer
    with pytest.raises(InputError, match=message) as caught:
        list_lines(Path("owner/name"))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # of the library and what it imports
def test_the_real_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed: pip install 'dmpt-export[data]'")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    write_wikitext(tmp_path / "Salesforce" / "wikitext", [" = Title =\n", "", " text of {} \n"])
    assert list_lines(Path("wikitext-103")) == ["= Title =", "text of wikitext-103-raw-v1 train"]
    assert list_lines(Path("wikitext-2:test[1:]")) == ["text of wikitext-2-raw-v1 test"]
    for name, message in (("wikitext-2:none", "Unknown split"), ("wikitext-2:none:train", "none")):
        with pytest.raises(InputError, match=f"does not provide .*{message}"):
            list_lines(Path(name))
    with pytest.raises(InputError, match="hub cannot be reached"):
        list_lines(Path("nobody/nothing"))


# --- through the commands -----------------------------------------------------------------------------


def test_train_and_eval_read_them_and_resume_finds_them_again(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    sample_text: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = sample_text.split("\n")
    plain = write(tmp_path / "plain.txt", lines)
    other = write(tmp_path / "other.jsonl.zst", lines, field="body")
    held_out = write(tmp_path / "held-out.parquet", lines, field="body")
    small = "--max-length 16 --batch-size 2 --grad-accum-steps 1 --log-every 1 --cpu --lr-schedule constant".split()
    small += ["--warmup-steps", "0", "--lr", "1e-3"]

    def losses(run: str) -> list[float]:
        records = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [record.get("loss", record.get("eval_loss")) for record in records]

    def train(run: str, steps: int, *more: str) -> None:
        assert main(["train", str(tiny_gpt2), str(tmp_path / run), "--max-steps", str(steps), *small, *more]) == 0

    train("plain", 3, "--data", str(plain), "--eval-data", str(plain))
    monkeypatch.chdir(tmp_path)
    train("other", 2, "--data", other.name, "--eval-data", held_out.name, "--text_field", "body")
    monkeypatch.chdir("/")
    assert main(["train", "--out", str(tmp_path / "other"), "--resume", "--max-steps", "3"]) == 0
    assert losses("other")[:2] + losses("other")[3:] == losses("plain")

    capsys.readouterr()
    for text in (plain, other, held_out):
        more = [] if text == plain else ["--text-field", "body"]
        assert main(["eval", str(tiny_gpt2), "--data", str(text), "--max-length", "32", "--json", *more]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0] == found[1] == found[2]
    assert found[0]["tokens"] > 100

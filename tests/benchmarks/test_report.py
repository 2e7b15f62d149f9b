"""The report page: its content, and its layout in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.comparison.ranking import front, rankings
from benchmarks.comparison.result import Comparison
from benchmarks.report import bench, damage, growth, layers, svg
from benchmarks.report.page import POLICY, page
from benchmarks.speed.profiling import by_type
from tests.helpers.rows import BASE, DMPT, TUNED, row

SVG = "{http://www.w3.org/2000/svg}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROUTES = {
    "model": "DMPT",
    "leaves": ["left", "right"],
    "heads": True,
    "tokens": [["The", 0, 1, 0.5], [" <b>tide", 1, 2, 0.75], ["\n", 1, 3, 0.9], [" & mill", 0, 0, 1.0]],
}


def quantized(folder: Path, report: bool) -> str:
    """A folder with the files that layers.layers() reads."""
    folder.mkdir()
    names = [f"{node}.h.{i}.{kind}.weight" for node, blocks in (("transformer", (0, 1)), ("paths.left", (2,)))
             for i in blocks for kind in layers.KINDS]  # fmt: skip
    names += ["heads.0.weight", "heads.1.weight", "transformer.wte.weight"]
    tensors = {name: {"scheme": "int8", "bits": 4 + 4 * (i % 2), "block": 32} for i, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps({"quantization": {"scheme": "int8", "tensors": tensors}}))
    if report:
        losses = [{"name": name, "relative_error": 0.01, "kl": 0.001 * i} for i, name in enumerate(names)]
        (folder / layers.REPORT_NAME).write_text(json.dumps({"tensors": losses}))
    return str(folder)


@pytest.fixture
def result(tmp_path: Path) -> Comparison:
    """A comparison with everything that can be drawn."""
    peers = [row("llama.cpp", "q8_0", 7, 51.5, 600), row("<script>alert(1)</script>", "fp32", 21, 50.5, 120)]
    crashed = replace(row("openvino", "int8", 6, None, None), failure="RuntimeError: no such <kernel>", size_bytes=0)
    many = [row("DMPT", f"mix{i}", 9 + 0.1 * i, 52 + 0.05 * i, 350 + i) for i in range(3)]
    rows = [BASE, *TUNED, *DMPT, *peers, crashed, *many]
    rows[2] = replace(rows[2], kind="quantized", path=quantized(tmp_path / "with", True))
    rows[3] = replace(rows[3], kind="quantized", path=quantized(tmp_path / "without", False))
    tests = [{"test": f"tg8 @ d{d}", "depth": d, "tokens": 8, "tokens_per_s": 100 - d / 20} for d in (8, 512, 900)]
    shapes = [{"paths": p, "heads": h, "fast_k": k} for p, h, k in ((1, 4, 64), (2, 4, 64), (2, 4, 256), (2, 8, 256))]
    grown = [{"name": f"m{i}", "scheme": "int8", "threads": t, "shape": shape, "tests": tests}
             for i, shape in enumerate(shapes) for t in (1, 2)]  # fmt: skip
    return Comparison(rows, ["text"], ["dmpt-export"], absent=["nobody is not measured: pip install nobody"],
                      routes=ROUTES, growth=grown)  # fmt: skip


class Elements(HTMLParser):
    """Every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def unnamed(text: str) -> list[str]:
    """Figures and images without an accessible name."""
    images = [(tag, a) for tag, a in Elements(text).found if tag in ("svg", "img", "figure") or a.get("role") == "img"]
    assert images
    return [tag for tag, a in images if not a.get("aria-label") or (tag == "svg" and a.get("role") != "img")]


# --- content ------------------------------------------------------------------------------------------


def test_the_page_says_everything_and_escapes_it(result: Comparison) -> None:
    text = page(result)
    assert unnamed(text) == []
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;tide" in text
    assert "&lt;kernel&gt;" in text
    for part in ("Size, perplexity and speed", "Growth of decode time", "Bits and damage by layer", "Routes of a",
                 "pip install nobody", "no quantization_report.json", "path right, head 2: weight 75 %"):  # fmt: skip
        assert part in text, part
    for what in growth.LABELS.values():
        assert f"Decode time against {what}" in text
    assert not [a for _, a in Elements(text).found if {"src", "href"} & a.keys() and a.get("href") != "data:,"]


def test_a_missing_control_is_said_in_place_of_a_claim() -> None:
    text = page(Comparison([BASE, *DMPT], ["text"], []))
    assert "The control is missing" in text
    assert "(no control)" in text
    assert '<td class="left">missing</td>' in text
    with_control = page(Comparison([BASE, *TUNED, *DMPT], ["text"], []))
    assert "The control is missing" not in with_control
    assert "(no control)" not in with_control
    assert with_control.count('<td class="left">control</td>') == 3


def test_worse_and_slower_models_rank_below() -> None:
    good, worse, slower = TUNED[0], row("worse", "fp32", 20, 58, 100), row("slower", "fp32", 20, 50, 50)
    found = rankings([slower, worse, good])
    assert found["perplexity"].index(worse.name) == 2
    assert found["decode time"].index(slower.name) == 2
    assert front([slower, worse, good]) == [good.name]
    untimed = row("untimed", "fp32", 1, 10, None)
    assert front([good, untimed]) == [good.name]
    assert front([good, untimed], timed=False) == [untimed.name]


def test_times_of_other_runs_and_contexts_are_not_joined() -> None:
    def timed(threads: int, depth: int, speed: float) -> dict[str, Any]:
        test = {"test": f"tg8 @ d{depth}", "depth": depth, "tokens": 8, "tokens_per_s": speed}
        return {"name": "m", "scheme": "int8", "threads": threads, "shape": {}, "tests": [test]}

    alike = growth.growth([timed(1, 8, 10.0), timed(2, 8, 20.0)])
    assert alike["threads"] == [("m", [(1, 100.0), (2, 50.0)])]
    unlike = growth.growth([timed(1, 8, 10.0), timed(2, 8, 20.0), timed(2, 64, 25.0)])
    assert unlike["threads"] == [("m, context 8", [(1, 100.0), (2, 50.0)])]
    renamed = growth.apart([timed(1, 8, 10.0)], [replace(BASE, name="m")])
    assert [r["name"] for r in renamed] == ["m (bench)"]
    assert growth.apart([timed(1, 8, 10.0)], [BASE])[0]["name"] == "m"


def test_the_figure_of_damage_names_what_it_shows() -> None:
    rows: list[tuple[str, list[damage.Dot]]] = [
        ("transformer.h.11.attn.c_attn", [(0.01, 8.5, "int8", True), (0.1, 4.5, "int4", False)]),
        ("heads.1", [(0.0, 1.0, "delta:4:int8", True)]),
    ]
    texts = [(t.text or "", t.attrib) for t in ElementTree.fromstring(damage.chart(rows, "KL")).iter(f"{SVG}text")]
    words = [text for text, _ in texts]
    assert [word for word in words if word.endswith("bits") or word == "delta"] == ["4 bits", "8 bits", "delta"]
    assert "Filled: chosen; hollow: measured; at the left edge: no damage measured" in words
    ends = [float(a["x"]) - svg.LETTER * len(text) for text, a in texts if a.get("text-anchor") == "end"]
    assert len(ends) == len(rows)
    assert min(ends) >= 0
    plain = damage.chart([("a", [(0.01, 8.5, "int8", True)])], "KL")
    assert "hollow" not in plain
    assert "left edge" not in plain


def test_scales_have_ticks_within() -> None:
    for low, high, log in ((76, 80, False), (1, 22, True), (0.001, 4000, True), (5, 5, False), (50, 51, True)):
        scale = svg.Scale.around([low, high], 0, 100, log)
        ticks = scale.ticks()
        assert 2 <= len(ticks) <= 10, (low, high, ticks)
        assert all(scale.low <= t <= scale.high for t in ticks)
        assert 0 <= scale(low) <= scale(high) <= 100
    assert svg.Scale.around([10, 10], 0, 100, zero=True)(10) < 95  # a flat curve keeps off the axis' name


def test_a_strange_report_of_damage_is_left_aside(tmp_path: Path) -> None:
    folder = Path(quantized(tmp_path / "q", True))
    assert layers.layers(folder)[1]["kl"] == 0.001
    for text in ("{", "[]", '{"tensors": 1}', '{"tensors": [1]}', '{"tensors": [{"name": "x", "kl": "high"}]}'):
        (folder / layers.REPORT_NAME).write_text(text)
        assert "kl" not in layers.layers(folder)[1]


def test_time_by_node_type_charges_an_if_for_its_rest() -> None:
    def node(kind: str, ts: int, dur: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{kind}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": kind}}

    runs = [{"name": "model_run", "ts": ts, "dur": 100} for ts in (0, 1000, 2000)]
    steps = [
        n
        for ts in (1000, 2000)
        for n in (node("If", ts + 10, 50), node("MatMul", ts + 20, 30), node("Add", ts + 70, 5))
    ]
    found = by_type([node("MatMul", 5, 90), *runs, *steps], 2)
    assert found == pytest.approx({"(outside nodes)": 0.045, "MatMul": 0.03, "If": 0.02, "Add": 0.005})
    assert "Time by node type of m" in bench.page([], {"m": found})


# --- in a browser -------------------------------------------------------------------------------------


def browse(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
               f"--user-data-dir={file.parent / 'profile'}", *options, file.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)


def console(said: str) -> list[str]:
    return [line for line in said.splitlines() if "CONSOLE" in line]


MEASURE = """<script>
const boxes = e => [...e.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
const hit = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
const found = [];
for (const details of document.querySelectorAll('details')) details.open = true;
for (const e of document.querySelectorAll('svg')) {
  const all = boxes(e);
  const frame = e.getBoundingClientRect();
  if (!frame.width) continue;  // of the two sizes of a figure only one shows
  all.forEach(([a, x], i) => {
    if (x.left < frame.left - 1 || x.right > frame.right + 1) found.push('outside: ' + a);
    all.slice(i + 1).forEach(([b, y]) => { if (hit(x, y)) found.push(a + ' over ' + b); });
  });
}
const alone = [...document.querySelectorAll('.plots > figure:only-child > svg')].map(e => e.getBoundingClientRect());
const main = document.querySelector('main').clientWidth;
const figures = alone.filter(box => box.width).map(box => [box.width / main, box.height]);
document.title = JSON.stringify({found, figures, wide: document.documentElement.scrollWidth - window.innerWidth});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_shows_it_without_a_complaint(result: Comparison, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(result), encoding="utf-8")
    shown = browse(file, "--dump-dom")
    assert shown.returncode == 0
    assert console(shown.stderr) == []
    assert unnamed(shown.stdout) == []
    # Its own policy lets the browser refuse all that is not inline, and say so: this shows that it would be seen.
    file.write_text(page(result).replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'), encoding="utf-8")
    assert any("Content Security Policy" in line for line in console(browse(file, "--dump-dom").stderr))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("verb", ["compare", "bench"])
def test_nothing_overlaps_or_leaves_the_screen(result: Comparison, verb: str, width: int, tmp_path: Path) -> None:
    nodes = {"dmpt": {"GroupQueryAttention": 123.4, "If": 0.5, "(outside nodes)": -0.1}}
    text = page(result) if verb == "compare" else bench.page(result.growth, {**nodes, "gpt2": nodes["dmpt"]})
    measured = measure(text, width, tmp_path)
    assert measured["found"] == []
    assert measured["wide"] <= 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_figure_alone_takes_the_width(result: Comparison, width: int, tmp_path: Path) -> None:
    one = replace(result, growth=result.growth[:1])  # a single curve, besides size against perplexity
    figures = measure(page(one), width, tmp_path)["figures"]
    assert len(figures) == 2
    assert all(share > 0.95 and height < 600 for share, height in figures)


def measure(text: str, width: int, tmp_path: Path) -> dict[str, Any]:
    """What MEASURE finds on a page in a frame of this width."""
    file = tmp_path / "report.html"
    file.write_text(text.replace(POLICY, "").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"  # a window cannot be as narrow as a phone
    frame.write_text(f'<iframe src="report.html" style="width:{width}px;height:900px"></iframe>', encoding="utf-8")
    script = "<script>onload=()=>{document.body.dataset.found=frames[0].document.title}</script>"
    frame.write_text(frame.read_text() + script, encoding="utf-8")
    shown = browse(frame, "--dump-dom", "--allow-file-access-from-files")
    ((_, body),) = [element for element in Elements(shown.stdout).found if element[0] == "body"]
    measured: dict[str, Any] = json.loads(body["data-found"] or "")
    return measured

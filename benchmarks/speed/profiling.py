"""Profile a decoding step by node type, with ONNX Runtime's profiler on this project's exports."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import Case
from benchmarks.speed.processes import worker
from benchmarks.speed.timing import Target, prompt_ids

KERNEL = "_kernel_time"  # the profile's name for a node's own run


def profile(targets: Sequence[Target], case: Case, threads: int | None, device: str) -> dict[str, dict[str, float]]:
    """Model -> node type -> milliseconds per decoded token, largest first; "(outside nodes)" is the rest of a run.

    Each model runs once more in its own process, greedily as in `case`. Profiling slows the steps down, so the shares
    are meaningful, not the sums. An `If` counts only the time outside its branch's nodes.
    """
    out = {}
    for t in targets:
        with worker(t.name, t.python) as w:
            facts = w.ask(do="load", adapter=t.adapter, path=t.path, threads=threads, device=device)
            ids = prompt_ids(min(case.depth, facts["context"] - case.tokens), facts["vocab_size"], None)
        with worker(t.name, t.python) as w:
            out[t.name] = w.ask(do="profile", path=t.path, threads=threads, device=device, ids=ids, n=case.tokens)
    return out


def of_folder(path: str, threads: int | None, device: str, ids: list[int], n: int) -> dict[str, float]:
    """Node type -> milliseconds per token of n greedy steps after `ids`, in this process."""
    from benchmarks.peers.adapters import dmpt_onnx
    from runtime import session

    real = session.session_options
    with tempfile.TemporaryDirectory(prefix="dmpt-profile-") as folder:

        def options(*arguments: Any) -> Any:
            found = real(*arguments)
            found.enable_profiling = True
            found.profile_file_prefix = str(Path(folder) / "ort")
            return found

        session.session_options = options  # type: ignore[assignment]  # the same arguments, passed on
        try:
            adapter = dmpt_onnx.load(path, threads, device)
        finally:
            session.session_options = real
        adapter.decode(ids, n)
        file = Path(adapter.model.engine._session.end_profiling())  # there is no public way
        events = json.loads(file.read_text(encoding="utf-8"))
    return by_type(events, n)


def by_type(events: Sequence[dict[str, Any]], n: int) -> dict[str, float]:
    """Milliseconds per run of the last n runs, by node type, largest first.

    A node that contains others (`If`) counts only the time outside them.
    """
    runs = [e for e in events if e.get("name") == "model_run"][-n:]
    first = runs[0]["ts"]
    nodes = sorted(
        (e for e in events if e.get("cat") == "Node" and e["name"].endswith(KERNEL) and e["ts"] >= first),
        key=lambda e: (e["ts"], -e["dur"]),
    )
    totals: dict[str, float] = {}
    open_: list[tuple[float, str]] = []  # (end, type) of nodes that are still running
    for event in nodes:
        kind = event["args"].get("op_name", "?")
        while open_ and open_[-1][0] <= event["ts"]:
            open_.pop()
        if open_:
            totals[open_[-1][1]] -= event["dur"]
        else:
            totals[""] = totals.get("", 0.0) + event["dur"]
        totals[kind] = totals.get(kind, 0.0) + event["dur"]
        open_.append((event["ts"] + event["dur"], kind))
    inside = totals.pop("", 0.0)
    totals["(outside nodes)"] = sum(e["dur"] for e in runs) - inside
    return {kind: us / 1000 / n for kind, us in sorted(totals.items(), key=lambda pair: -pair[1])}

"""What a verb reads is parsed and tokenised once, however many of its steps need it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dmpt_export.cli.main import main
from quant import text as calibration_text
from training.checkpoints import files


def test_a_config_is_parsed_once_in_an_export(tiny_dmpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_dmpt, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(f"{config}\n\n")  # no other test has read these bytes
    parsed = []

    def loads(text: str, **more: Any) -> Any:
        parsed.append(text)
        return loads_of(text, **more)

    loads_of = json.loads
    monkeypatch.setattr(json, "loads", loads)
    assert main(["onnx", str(folder), str(tmp_path / "device")]) == 0
    assert sum(text == f"{config}\n\n" for text in parsed) == 1
    first, second = files.read_json(folder / "config.json"), files.read_json(folder / "config.json")
    first["splits"].append(3)
    assert second["splits"] != first["splits"]  # nobody changes what others read


def test_calibration_text_is_tokenised_once(
    tiny_gpt2: Path, sample_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text, encoding="utf-8")
    calls = []

    def first_tokens(*arguments: Any) -> Any:
        calls.append(arguments)
        return first_tokens_of(*arguments)

    first_tokens_of = calibration_text.first_tokens
    monkeypatch.setattr(calibration_text, "first_tokens", first_tokens)
    arguments = ["--scheme", "int4-gptq", "--calib", str(text), "--calib-tokens", "128"]
    assert main(["quantize", str(tiny_gpt2), str(tmp_path / "out"), *arguments]) == 0
    assert len(calls) == 1

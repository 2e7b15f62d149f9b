"""DMPTOnnxForCausalLM gives the same results under generate() as the torch model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from runtime import RequestError
from tests.helpers.models import saved_model
from tests.helpers.tolerances import TOLERANCE
from training.errors import InputError

ATOL = TOLERANCE["float32", "float"]
IDS = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"splits": [], "heads": 1},
    "dual": {"splits": [2], "heads": 4, "fast_k": 16},
    "quad": {"splits": [1, 3], "heads": 8, "fast_k": 16, "head_topk": 1},
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """(the torch model, the same exported)."""
    from dmpt_export import DMPTOnnxForCausalLM
    from dmpt_export.onnx.export import export_onnx
    from training.checkpoints.checkpoint import load_model

    out = tmp_path_factory.mktemp(request.param)
    source = saved_model(out / "model", **SHAPES[request.param])
    export_onnx(source, out / "onnx", verify=False)
    onnx = DMPTOnnxForCausalLM.from_pretrained(out / "onnx", threads=1)
    yield load_model(source), onnx
    onnx.close()


def mask_of(*padding: int) -> torch.Tensor:
    """Left padding of each row of IDS."""
    return torch.stack([(torch.arange(IDS.shape[1]) >= n).long() for n in padding])


def both(pair: tuple[Any, Any], *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)
    expected = pair[0].generate(*arguments, pad_token_id=0, **options)
    torch.manual_seed(7)
    return expected, pair[1].generate(*arguments, pad_token_id=0, **options)


def test_logits_are_those_of_the_torch_model(pair: tuple[Any, Any]) -> None:
    expected, found = (model(IDS).logits for model in pair)
    assert found.shape == (3, 9, 97)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(pair[1](IDS, logits_to_keep=2).logits, expected[:, -2:], atol=ATOL, rtol=0)


def test_rows_of_padding_do_not_count(pair: tuple[Any, Any]) -> None:
    mask = mask_of(0, 4, 8)
    expected, found = (model(IDS, attention_mask=mask).logits for model in pair)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=ATOL, rtol=0)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, 9))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("last", [0, 1, 3])
def test_pieces_with_a_cache_are_the_whole(pair: tuple[Any, Any], rows: int, last: int) -> None:
    whole = pair[1](IDS[:rows]).logits
    out = pair[1](IDS[:rows, :4], use_cache=True, logits_to_keep=last)
    torch.testing.assert_close(out.logits, whole[:, :4][:, -last:], atol=ATOL, rtol=0)
    assert out.past_key_values.get_seq_length() == 4
    out = pair[1](IDS[:rows, 4:], past_key_values=out.past_key_values, logits_to_keep=last)
    torch.testing.assert_close(out.logits, whole[:, 4:][:, -last:], atol=ATOL, rtol=0)
    assert out.past_key_values.get_seq_length() == 9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]], "repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 10, "temperature": 0.9},
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 2},
        {"use_cache": False},
    ],
    ids=lambda options: ",".join(options) or "greedy",
)
@pytest.mark.parametrize("rows", [1, 3])
def test_generate_says_what_torch_says(pair: tuple[Any, Any], rows: int, options: dict[str, Any]) -> None:
    expected, found = both(pair, IDS[:rows], max_new_tokens=12, **{"do_sample": False, **options})
    assert found.tolist() == expected.tolist()


def test_a_left_padded_batch_is_its_rows_alone(pair: tuple[Any, Any]) -> None:
    padding = (0, 3, 7)
    options = {"attention_mask": mask_of(*padding), "max_new_tokens": 8, "do_sample": False}
    expected, found = both(pair, IDS, **options)
    assert found.tolist() == expected.tolist()
    for row, n in enumerate(padding):
        _, alone = both(pair, IDS[row : row + 1, n:], max_new_tokens=8, do_sample=False)
        tail = alone[0, IDS.shape[1] - n :].tolist()
        assert found[row, IDS.shape[1] :].tolist()[: len(tail)] == tail


def test_lookup_decoding_says_what_greedy_says(pair: tuple[Any, Any]) -> None:
    prompt = torch.cat([IDS[:1], IDS[:1]], dim=1)
    if hasattr(DynamicCache, "activate_past_recording"):  # Transformers 5: it wants a cache of its own
        with pytest.raises(InputError, match="speculate"):
            pair[1].generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=4)
        return
    expected, found = (
        pair[1].generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, **options)
        for options in ({}, {"prompt_lookup_num_tokens": 4})
    )
    wanted = expected.tolist()[0]
    assert found.tolist()[0][: len(wanted)] == wanted  # transformers may write a guess more than asked for


def test_more_logits_than_tokens_are_those_of_the_tokens(pair: tuple[Any, Any]) -> None:
    assert pair[1](IDS, logits_to_keep=20).logits.shape == (3, 9, 97)


def test_what_cannot_be_done_is_said(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model = pair[1]
    with pytest.raises(InputError, match="not on the left"):
        model(IDS, attention_mask=mask_of(0, 0, 4).flip(1))
    with pytest.raises(InputError, match="not on the left"):
        model(IDS, attention_mask=torch.zeros(3, 9))
    with pytest.raises(RequestError, match="unknown token id 97"):
        model(torch.tensor([[97]]))
    for rows in (1, 2):
        with pytest.raises(RequestError, match="context"):
            model.generate(IDS[:rows], max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    with pytest.raises(InputError, match="must come from this model"):
        model(IDS, past_key_values=DynamicCache())
    for rows, others in ((1, 2), (2, 1), (2, 3)):
        past = model(IDS[:rows], use_cache=True).past_key_values
        with pytest.raises(InputError, match=f"holds {rows} rows, input_ids has {others}"):
            model(IDS[:others, :1], past_key_values=past)
        assert past.get_seq_length() == IDS.shape[1]
    for mask in (torch.ones(3, 8), torch.ones(2, 9), torch.ones(4, 9), torch.ones(9), torch.ones(3, 1, 9, 9)):
        with pytest.raises(InputError, match=r"attention_mask .* does not fit"):
            model(IDS, attention_mask=mask)
    for ids in (IDS[0], IDS[:0], IDS[:, :0], IDS[None]):
        with pytest.raises(InputError, match=r"input_ids .* must be rows"):
            model(ids)
    for keep in (-1, torch.tensor([0, 1])):
        with pytest.raises(InputError, match="logits_to_keep"):
            model(IDS, logits_to_keep=keep)
    for unknown in ({"labels": IDS, "input_ids": IDS}, {"inputs_embeds": torch.zeros(3, 9, 32)}, {}):
        with pytest.raises(InputError, match="not labels or inputs_embeds"):
            model(**unknown)
    assert model(IDS[:1], return_dict=True, labels=None).logits.shape == (1, 9, 97)
    with pytest.raises(RequestError, match="deterministic"):
        type(model).from_pretrained(model.runtime.folder, threads=2, deterministic=True)
    with pytest.raises(InputError, match="copy"):
        model.save_pretrained(tmp_path)


def test_pipeline_writes_text(tiny_dmpt: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast, pipeline

    import runtime
    from dmpt_export import DMPTOnnxForCausalLM
    from dmpt_export.onnx.export import export_onnx

    out = tmp_path / "onnx"
    export_onnx(tiny_dmpt, out, verify=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out, padding_side="left", pad_token="<|endoftext|>")
    write = pipeline("text-generation", model=DMPTOnnxForCausalLM.from_pretrained(out, threads=1), tokenizer=tokenizer)
    options = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
    with runtime.load(out, threads=1) as model:
        for text in ("The tide", "When water enters a pond"):
            ids = model.generate(model.encode(text), max_new_tokens=10)
            assert write(text, **options)[0]["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)
    texts = ["The tide", "When water enters a pond"]
    both_texts = write(texts, batch_size=2, **options)
    assert [found[0] for found in both_texts] == [write(text, **options)[0] for text in texts]


def test_importing_the_package_imports_nothing_heavy_and_a_missing_package_is_one_line() -> None:
    code = (
        "import sys\n"
        "import dmpt_export\n"
        "assert not {'torch', 'transformers', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "assert not hasattr(dmpt_export, 'Nonsense')\n"
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'transformers' else found(name, *rest)\n"
        "import dmpt_export.extras as extras\n"
        "extras.find_spec = util.find_spec\n"
        "try:\n"
        "    dmpt_export.DMPTOnnxForCausalLM\n"
        "except extras.MissingExtra as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "this command needs transformers: pip install 'dmpt-export[train]'\n"

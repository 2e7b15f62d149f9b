"""Compare the ids of a fixed text between this project and Transformers' tokenizer of a GPT-2 folder."""

from __future__ import annotations

from pathlib import Path

from training.errors import ValidationError
from training.text.tokenizer import encode, has_tokenizer, load_tokenizer, row_count, transformers_tokenizer

TEXT = (
    "The tide mill, built in 1897, cost £ 40.50; didn't it?  Two  spaces,\tone tab\nand a line.\r\n   Naïve cafés "
    "– “quoted” — 日本語 한국어 Ελληνικά мельница עברית हिन्दी 😀👩‍👩‍👧 x=y**2+1; \u200b\ufeff end "
)
MOST_BEHIND = 2  # most ids that a template may append to a text; training.text.tokenizer leaves them out


def verify_tokenizer(folder: Path) -> None:
    """Raise ValidationError if the text, or one of the folder's special tokens, gets different ids."""
    if not has_tokenizer(folder):
        return
    theirs, ours, rows = transformers_tokenizer(folder), load_tokenizer(folder), row_count(folder)
    added = [token.content for i, token in theirs.added_tokens_decoder.items() if rows is None or i < rows]
    for text in (TEXT, *(f"{a}{token}{b}" for token in added for a, b in (("", ""), ("tide ", " mill"), ("a", "b")))):
        want = theirs(text, add_special_tokens=True)["input_ids"]
        got = encode(ours, text)
        if got != want[: len(got)] or len(want) - len(got) > MOST_BEHIND:
            at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
            raise ValidationError(
                f"{folder}: this program tokenises {text!r} differently from Transformers: from token {at} on "
                f"{got[at : at + 5]} instead of {want[at : at + 5]}. Please report it; --no-verify skips this check"
            )

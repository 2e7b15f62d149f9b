"""A checkpoint of another form -> checkpoint folder: a .pt file, or a DMPT whose full heads become projected ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmpt_export.extras import require
from dmpt_export.requests.sources import check_tokenizer
from training.errors import FieldError, OptionError
from training.progress import say, tell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from training.model.shape import Shape


@dataclass(frozen=True)
class Found:
    """Everything that check() read."""

    head_allocation: dict[str, list[int]] | None = None  # for a .pt file
    folder: Path | None = None  # of the DMPT whose heads are converted
    ids: NDArray[np.int64] | None = None  # [n, S], windows of the calibration text


@dataclass(frozen=True)
class Converted:
    """The outcome of convert."""

    parameters: int
    shape: Shape
    notes: list[str]  # what had to be inferred, or what the conversion of heads changed


@dataclass(frozen=True)
class ConvertRequest:
    source: str  # .pt file; with `heads` a DMPT folder or hub id
    out: Path  # folder
    tokenizer: str | None = None  # for a .pt file: folder or hub id to copy the tokenizer from
    head_allocation: Path | None = None  # for a .pt file: JSON file of the heads of each leaf
    n_head: int | None = None  # for a .pt file: attention heads per block; None: from the file, else width / 64
    heads: str | None = None  # projected: what the full heads of a DMPT become
    head_rank: int | None = None  # of projected heads; None: whole matrices
    calib: str | None = None  # text file that projected heads are fitted on
    calib_tokens: int = 32768  # number of its tokens to use; a projection has more to learn from it than a scheme
    overwrite: bool = False  # an earlier result in `out` is replaced

    def check(self) -> Found:
        """Raise OptionError for fields that exclude each other, then InputError for unusable files."""
        self.check_fields()
        require("train")
        from training.checkpoints.places import check_inputs, check_new

        check_new(self.out, "checkpoint", self.overwrite)
        check_inputs(self.out, self.source, self.tokenizer, self.head_allocation, self.calib)
        return self.check_file() if self.heads is None else self.check_heads()

    def check_fields(self) -> None:
        if self.heads is None:
            if self.head_rank is not None or self.calib is not None:
                raise OptionError("{head_rank} and {calib} are for {heads} projected")
            return
        if self.tokenizer is not None or self.head_allocation is not None or self.n_head is not None:
            raise OptionError(
                "{tokenizer}, {head_allocation} and {n_head} are for .pt files: leave them out with {heads}"
            )
        if self.calib is None:
            raise OptionError("projected heads are fitted on calibration text: give some with {calib}")

    def check_file(self) -> Found:
        from training.checkpoints.files import check_pt
        from training.checkpoints.folder import read_head_allocation

        if Path(self.source).is_dir():
            raise FieldError("{} is a folder: give a .pt file, or {heads} projected for a DMPT's folder", self.source)
        check_pt(Path(self.source))
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer)
        return Found(None if self.head_allocation is None else read_head_allocation(self.head_allocation))

    def check_heads(self) -> Found:
        from quant.text import read_ids
        from training.checkpoints.folder import float_folder, read_shape
        from training.model.new_shape import projected_fields

        assert self.calib is not None
        folder = float_folder(self.source)
        shape = read_shape(folder)
        projected_fields(shape, self.head_rank)
        ids = read_ids(self.calib, folder, shape, self.calib_tokens)
        if len(ids) < 2:
            raise FieldError(
                "{} gives one window of {} tokens: the fit needs two or more, one of them to measure on: give a longer "
                "text, or more {calib_tokens}", self.calib, ids.size,
            )  # fmt: skip
        return Found(folder=folder, ids=ids)

    def run(self, found: Found) -> Converted:
        """Write the checkpoint, after check()."""
        from training.checkpoints.lock import working_in

        say("loading PyTorch")
        with working_in(self.out, "convert", beside=True):
            return self.convert_file(found) if found.folder is None else self.convert_heads(found)

    def convert_file(self, found: Found) -> Converted:
        from training.checkpoints.checkpoint import model_from_tensors, save_model
        from training.checkpoints.original import read_original

        file = Path(self.source)
        checkpoint, notes = read_original(file, found.head_allocation, self.n_head)
        model = model_from_tensors(checkpoint.config, checkpoint.tensors)
        card = f"Converted from `{file.name}`.\n\n{as_list(notes)}"
        save_model(model, self.out, tokenizer_from=self.tokenizer, card=card)
        return Converted(model.num_parameters(), checkpoint.config, notes)

    def convert_heads(self, found: Found) -> Converted:
        import torch

        from quant.projections import project_heads
        from training.checkpoints.checkpoint import load_model, save_model

        assert found.folder is not None
        assert found.ids is not None
        model = load_model(found.folder)
        say("fitting projected heads")
        fitted = project_heads(model, torch.from_numpy(found.ids), self.head_rank)
        vocab_size = model.config.vocab_size
        if fitted.perplexity_before > vocab_size:
            tell(
                f"warning: on {self.calib} the model's perplexity is {fitted.perplexity_before:.0f}, worse than "
                f"guessing among its {vocab_size} tokens: give text of the kind that it was trained on"
            )
        notes = [
            f"{model.num_parameters():,} parameters became {fitted.model.num_parameters():,}",
            f"KL to the full heads: {fitted.kl:.6f} nats per token, on {fitted.tokens:,} tokens held out from the fit",
            f"perplexity on them: {fitted.perplexity:.2f}, with the full heads {fitted.perplexity_before:.2f}",
        ]
        card = f"Projected heads, fitted to the full heads of `{Path(self.source).name}`.\n\n{as_list(notes)}"
        save_model(fitted.model, self.out, tokenizer_from=found.folder, card=card, source=found.folder)
        return Converted(fitted.model.num_parameters(), fitted.model.config, notes)


def as_list(notes: list[str]) -> str:
    """A Markdown list, also readable in a terminal."""
    return "".join(f"- {note}\n" for note in notes)

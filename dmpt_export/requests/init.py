"""GPT-2 -> DMPT checkpoint, without training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from dmpt_export.extras import require
from training.errors import OptionError, usage
from training.progress import say

if TYPE_CHECKING:
    from training.model.new_shape import NewShape
    from training.model.shape import Shape


@dataclass(frozen=True)
class Found:
    """Everything that check() read."""

    folder: Path  # of the GPT-2
    shape: NewShape


@dataclass(frozen=True)
class Made:
    """The outcome of init."""

    parameters: int
    shape: Shape
    has_tokenizer: bool


@dataclass(frozen=True)
class InitRequest:
    source: str  # GPT-2 folder or hub id
    out: Path  # folder
    splits: list[int] | None = None  # indices of blocks; []: none; None: half the depth
    heads: int | None = None  # total vocabulary heads; None: 4 per leaf, at most 8
    head_allocation: Path | None = None  # JSON file of the heads of each leaf, instead of their number
    fast_k: int | None = None  # candidates of the anchor head; None: the whole vocabulary
    head_topk: int | None = None  # heads mixed per token; None: all of the leaf
    head_kind: str = "projected"  # or full
    head_rank: int | None = None  # of projected heads; None: whole matrices
    shared_anchor: bool | None = None  # one vocabulary matrix for all leaves; None: if heads are projected
    next_tokens: int | None = None  # draft heads of each leaf; None: none
    noise: float = 1e-3  # standard deviations of the embedding
    gate_bias: float = 0.25  # logits
    gate_hidden: int = 256  # width of gates and head gates
    tie: bool | None = None  # head 0 is the embedding; None: as in the source
    seed: int = 0
    overwrite: bool = False  # an earlier result in `out` is replaced

    def check(self) -> Found:
        """Raise OptionError for fields that exclude each other, then InputError for unusable files."""
        if self.heads is not None and self.head_allocation is not None:
            raise OptionError("{heads} and {head_allocation} exclude each other: the file already lists every head")
        require("train")
        from training.checkpoints.folder import float_folder, read_head_allocation, read_shape
        from training.checkpoints.places import check_inputs, check_new
        from training.model.new_shape import NewShape, check_init
        from training.model.shape import PROJECTED, check_head_kind

        with usage():
            check_head_kind(self.head_kind, self.head_rank, self.shared_anchor)
        check_new(self.out, "checkpoint", self.overwrite)
        check_inputs(self.out, self.source, self.head_allocation)
        allocation = None if self.head_allocation is None else read_head_allocation(self.head_allocation)
        own = {field.name: getattr(self, field.name) for field in fields(NewShape) if field.name != "head_allocation"}
        own["shared_anchor"] = self.head_kind == PROJECTED if self.shared_anchor is None else self.shared_anchor
        shape = NewShape(head_allocation=allocation, **own)
        folder = float_folder(self.source)
        check_init(read_shape(folder), shape).check_exportable()
        return Found(folder, shape)

    def run(self, found: Found) -> Made:
        """Write the checkpoint, after check()."""
        say("loading PyTorch")
        from training.checkpoints.checkpoint import load_model, save_model
        from training.checkpoints.lock import working_in
        from training.model.init import init_from_gpt2

        with working_in(self.out, "init", beside=True):
            model = init_from_gpt2(
                load_model(found.folder), found.shape, noise=self.noise, gate_bias=self.gate_bias, seed=self.seed
            )
            card = f"Initialised from `{Path(self.source).name}` without training."
            save_model(model, self.out, tokenizer_from=found.folder, card=card, source=found.folder)
        return Made(model.num_parameters(), model.config, (self.out / "tokenizer.json").is_file())

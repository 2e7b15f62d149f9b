"""The request of `dmpt-export train` and `accelerate launch -m training`. Heavy imports stay inside functions."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.checkpoints.atomic import sweep
from training.checkpoints.earlier import RUN, SAVED, recover_earlier, replacing
from training.checkpoints.files import resolve
from training.checkpoints.folder import float_folder, read_head_allocation, read_shape
from training.checkpoints.lock import check_free, working_in
from training.checkpoints.places import check_inputs, check_run
from training.cli.recipes import Recipe, read_recipe
from training.cli.run_folder import last_of, run_of, saved_state
from training.cli.texts import Reader, Texts, served
from training.cli.usual import SCRATCH, warning
from training.errors import OptionError, usage
from training.loop.freeze import expanded
from training.loop.options import TrainOptions, flag, read_freeze_schedule
from training.model.new_shape import NewShape, check_init
from training.model.shape import FULL, ROOT, Shape, check_head_kind
from training.progress import say, tell
from training.text.named import files_of
from training.text.sources import check_source

if TYPE_CHECKING:
    import numpy as np

    from training.loop.trainer import Extras, TrainResult
    from training.model.generation import DMPTForCausalLM
    from training.text.domains import Domains

PHASE = "phase-{}"  # folder of a recipe's phase, by its number from 1
SHAPING = ("splits", "heads", "head_allocation", "head_kind", "head_rank", "shared_anchor", "next_tokens")  # as in init


@dataclass(frozen=True)
class Found:
    """Everything that check() read."""

    out: Path
    resumed: Path | None  # what to continue: a run's checkpoint, or the run of a recipe's phases
    recipe: Recipe
    phases: list[TrainOptions]  # of each phase
    texts: Texts
    tokenizer: Path  # folder

    @property
    def first(self) -> Path | None:
        """The checkpoint that the first phase continues."""
        return None if len(self.phases) > 1 else self.resumed


@dataclass(frozen=True)
class Trained:
    """The outcome of training."""

    result: TrainResult
    main: bool  # whether this is the process that prints


@dataclass(frozen=True)
class TrainRequest:
    model: str | None = None  # DMPT or GPT-2 folder, or hub id; None with resume or from_scratch
    out: Path | None = None  # folder of the run; None: the one in resume
    data: tuple[Path, ...] = ()  # text files or hub datasets; none: wikitext-103, or those of the run
    eval_data: tuple[Path, ...] = ()  # held-out text, likewise
    domain: tuple[str, ...] = ()  # NAME=FILE, text to train on with the name of its domain
    learn_domains: int | None = None  # number of domains to find in a text without names
    domain_map: Path | None = None  # JSON file of what serves each domain; None: the model's, or shared out evenly
    text_field: str | None = None  # text field of JSONL, Parquet and datasets; None: "text", or the run's
    tokenizer: str | None = None  # folder or hub id; None: the model's
    resume: str | None = None  # run to continue; "": the one in out
    overwrite: bool = False  # replace the run in out
    recipe: str | None = None  # name of training.cli.recipes, or JSON file
    cache_dir: Path | None = None  # folder for tokenised text; None: the user's cache
    splits: list[int] | None = None  # indices of blocks where a GPT-2's paths fork; []: none; None: the recipe's
    heads: int | None = None  # total vocabulary heads, likewise
    head_allocation: Path | None = None  # JSON file of the heads of each leaf, instead of their number
    head_kind: str | None = None  # full or projected
    head_rank: int | None = None  # of projected heads
    shared_anchor: bool | None = None  # projected heads: one vocabulary matrix for all leaves
    next_tokens: int | None = None  # draft heads of each leaf
    use_head_mixture: bool | None = None  # False: a single head for each leaf
    gate_hidden: int = 256  # width of gates and head gates
    from_scratch: bool = False  # a new GPT-2 with random weights, of these sizes:
    n_layer: int = 12  # blocks
    n_embd: int = 768  # width
    n_head: int = 12  # attention heads of a block
    n_positions: int = 1024  # tokens of context
    options: TrainOptions = field(default_factory=TrainOptions)
    given: frozenset[str] | None = None  # options that win over a recipe's and a run's; None: those changed

    # --- checking -------------------------------------------------------------------------------------

    def check(self) -> Found:
        """Before torch is imported, raise OptionError for wrong fields and InputError for wrong files.

        First restores an earlier run that a kill left set aside.
        """
        out = self.place()
        if is_first():
            check_free(out)
            recover_earlier(out, RUN, SAVED)
        recipe = read_recipe(self.recipe) if self.recipe else Recipe()
        chosen = self.chosen()
        with usage():  # a recipe or a saved run may hold what the options need beside them
            alone = self.recipe is None and self.resume is None
            (TrainOptions.check if alone else TrainOptions.check_each)(TrainOptions(**chosen))
        resumed = None if self.resume is None else last_of(run_of(Path(self.resume or out)))
        saved = {} if resumed is None or len(recipe.phases) > 1 else saved_state(resumed)
        texts = self.texts(saved.get("about", {"model": self.model}))
        phases = [
            TrainOptions.from_dict(self.usual() | saved.get("options", {}) | phase | chosen, "the run")
            for phase in recipe.phases
        ]
        if resumed is None:
            check_run(out, self.overwrite)
            check_inputs(out, *self.inputs(), *(one.freeze_schedule for one in phases))
        first = None if len(phases) > 1 else resumed
        tokenizer = self.tokenizer or (first and str(first)) or self.model
        if first is None and self.model is None and not self.from_scratch:
            raise OptionError("MODEL is missing: to continue a recipe's phases, repeat the command with {resume}")
        if tokenizer is None:
            raise OptionError("{from_scratch} needs {tokenizer} FOLDER")
        found = Found(out, resumed, recipe, phases, texts, resolve(tokenizer))
        shape = self.check_shape(found)
        if resumed is None and is_first() and (line := warning(phases[0], shape, self.from_scratch)):
            tell(line)
        return found

    def chosen(self) -> dict[str, Any]:
        """The options that win over a recipe's and a run's."""
        default = vars(TrainOptions())
        given = {n for n, v in vars(self.options).items() if v != default[n]} if self.given is None else self.given
        return {name: getattr(self.options, name) for name in given}

    def usual(self) -> dict[str, Any]:
        """Defaults of a model with random weights, which those of fine-tuning do not suit."""
        return SCRATCH | {"max_length": self.n_positions} if self.from_scratch else {}

    def place(self) -> Path:
        """The run's folder. Raises OptionError when it or the model is missing."""
        out = self.out
        if out is None and self.resume:
            out = run_of(Path(self.resume))
        if out is None:
            raise OptionError("OUT is missing: dmpt-export train MODEL OUT {data} FILE")
        if self.model is None and not (self.from_scratch or self.resume is not None):
            raise OptionError("MODEL is missing: a GPT-2 or DMPT folder or hub id, or {from_scratch}")
        return out

    def inputs(self) -> list[str | Path | None]:
        """The inputs of a new run."""
        places = (self.model, self.tokenizer, self.head_allocation, self.recipe, self.cache_dir, self.domain_map)
        return [*places, *self.data, *self.eval_data, *files_of(self.domain)]

    def texts(self, about: dict[str, Any]) -> Texts:
        """This request's texts, else those of an earlier run, else the original project's; checked."""
        given = Texts.of(
            about, data=self.data, eval_data=self.eval_data, domain=self.domain, learn_domains=self.learn_domains,
            text_field=self.text_field,
        )  # fmt: skip
        given.domains()
        texts = given.or_default()
        if texts is not given and is_first():  # print once, not from every process
            tell("No text given: training on the hub dataset wikitext-103, like the original project")
        for file in texts.files:
            check_source(file)
        return texts

    def check_shape(self, found: Found) -> Shape:
        """The model's shape. Raises InputError for mistakes that config.json and the list of files reveal."""
        from training.text.tokenizer import load_tokenizer

        if found.first is not None:
            shape = read_shape(found.first)
        elif self.from_scratch:
            with usage():
                Shape.of(self.sizes()).check_exportable()
            load_tokenizer(found.tokenizer)
            with usage():
                shape = Shape.of(self.new_fields(found.tokenizer))
        else:
            assert self.model is not None
            shape = read_shape(float_folder(self.model))
        changes = None if found.first is not None else self.changes(shape, found.recipe)
        unused = ", ".join(flag(name) for name in SHAPING if getattr(self, name) is not None)
        if changes is None and unused and is_first():
            tell(f"note: the model keeps its shape, so {unused} has no effect: dmpt-export init changes a GPT-2")
        if changes is not None:
            shape = check_init(shape, changes)
        shape.check_exportable()
        if (domains := served(found.texts.domains(), self.domain_map, shape)) is not None:
            shape.domains = domains
            shape.check()
        for one in found.phases:
            one.check()
            one.check_installed()
            shape = one.check_shape(shape)
            expanded(read_freeze_schedule(one.freeze_schedule), shape)
        load_tokenizer(found.tokenizer)  # last: a foreign one needs Transformers, which takes seconds
        return shape

    # --- the model to start with ------------------------------------------------------------------------

    def start(self, found: Found) -> DMPTForCausalLM:
        """The model: resumed, new, or loaded, and converted to a DMPT if requested."""
        import torch

        from training.checkpoints.checkpoint import load_model
        from training.model.config import DMPTConfig
        from training.model.generation import DMPTForCausalLM
        from training.model.init import init_from_gpt2

        if found.first is not None:
            model = load_model(found.first)
        elif self.from_scratch:
            torch.manual_seed(self.options.seed)
            model = DMPTForCausalLM(DMPTConfig(**self.new_fields(found.tokenizer)))
        else:
            assert self.model is not None
            model = load_model(self.model)
        changes = None if found.first is not None else self.changes(model.config, found.recipe)
        if changes is not None:
            model = init_from_gpt2(model, changes)
        if (domains := served(found.texts.domains(), self.domain_map, model.config)) is not None:
            model.config.domains = domains  # of a resumed run: the trainer refuses others than before
        return model

    def new_fields(self, tokenizer: Path) -> dict[str, Any]:
        """The configuration of a new GPT-2 for a tokenizer."""
        from training.text.tokenizer import load_tokenizer
        from training.text.windows import end_of_text_id

        words = load_tokenizer(tokenizer)
        eot = end_of_text_id(words)
        vocabulary = {"vocab_size": words.get_vocab_size(), "bos_token_id": eot, "eos_token_id": eot}
        return {**vocabulary, **self.sizes(), "head_allocation": {ROOT: [0]}}

    def sizes(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in ("n_layer", "n_embd", "n_head", "n_positions")}

    def changes(self, start: Shape, recipe: Recipe) -> NewShape | None:
        """The shape that the initial model is converted to; None: unchanged."""
        mine = {name: getattr(self, name) for name in SHAPING if name != "head_allocation"}
        mine["fast_k"] = self.options.fast_k
        chosen = {key: value for key, value in mine.items() if value is not None}
        kept = () if chosen.get("head_kind") == FULL else ("head_rank", "shared_anchor")  # of a recipe, if they apply
        shape = {k: v for k, v in recipe.init.items() if k in kept or k not in ("head_rank", "shared_anchor")} | chosen
        allocation = read_head_allocation(self.head_allocation) if self.head_allocation else None
        with usage():
            check_head_kind(shape.get("head_kind", FULL), shape.get("head_rank"), shape.get("shared_anchor"))
        wanted = (
            {"splits", "heads", "head_kind", "next_tokens"} & set(shape)
            or allocation
            or self.use_head_mixture is not None
        )
        plain = not start.splits and start.n_vocab_heads == 1
        if not wanted or not plain:  # a DMPT keeps its shape
            return None
        if self.use_head_mixture is False:
            allocation, shape["heads"] = None, 2 ** len(shape.get("splits") or [0])
        return NewShape(head_allocation=allocation, gate_hidden=self.gate_hidden, **shape)

    # --- training -------------------------------------------------------------------------------------

    def run(self, found: Found) -> Trained:
        """Train with the inputs that check() found."""
        if is_first():
            say("loading PyTorch")
        from accelerate import PartialState

        from training.loop.setup import on_cpu
        from training.loop.trainer import Extras, train

        model = self.start(found)
        processes = PartialState(cpu=on_cpu(found.phases[0]))
        with processes.main_process_first():  # the main process tokenises, the others read the result
            reader = Reader(found.texts, found.tokenizer, self.cache_dir, model.config)
            (tokens, domains), eval_tokens = reader.training(), reader.tokens("eval_data")
        if found.texts.learned:
            from training.cli.learned import learned

            domains = learned(found.texts.domains(), found.resumed, model, tokens, found.phases[0], processes.device)
        source = found.resumed or (None if self.model is None else resolve(self.model))
        extras, main = Extras(found.tokenizer, found.texts.about, source), processes.is_main_process
        if len(found.phases) > 1:
            with working_in(found.out, "train") if main else nullcontext():
                result = self.run_phases(found, model, (tokens, eval_tokens, domains), extras, main)
        else:
            result = train(
                model, tokens, found.phases[0], found.out, eval_tokens, domains=domains,
                resume=found.resumed or False, overwrite=self.overwrite, extras=extras,
            )  # fmt: skip
        return Trained(result, main)

    def run_phases(
        self,
        found: Found,
        model: DMPTForCausalLM,
        texts: tuple[np.ndarray, np.ndarray | None, Domains | None],
        extras: Extras,
        main: bool,
    ) -> TrainResult:
        """Train a recipe's phases, each a run of its own in OUT/phase-N; OUT becomes the last one's model."""
        from training.checkpoints.checkpoint import load_model
        from training.loop import state
        from training.loop.trainer import train

        (tokens, eval_tokens, domains), out, resume = texts, found.out, found.resumed is not None
        new_run = not resume and main
        for number, options in enumerate(found.phases, start=1):
            folder = out / PHASE.format(number)
            started = resume and (folder / "last").is_dir()
            titled = replace(extras, title=f"phase {number} of {len(found.phases)}")
            new = number == 1 and new_run
            with replacing(out, RUN, SAVED) if new else nullcontext():
                result = train(
                    model, tokens, options, folder, eval_tokens, domains=domains,
                    resume=started, overwrite=self.overwrite, extras=titled,
                )  # fmt: skip
            model = load_model(folder)
        if main:
            sweep(out)
            state.publish(folder, out)
        return replace(result, folder=out)


def is_first() -> bool:
    """Whether this is the first of the processes of this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"

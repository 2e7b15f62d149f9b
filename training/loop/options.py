"""All settings of a training run, with the original project's names and defaults. Imports nothing heavy."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import FieldError, InputError, install
from training.model.shape import GATE_HARD, GATE_SOFT, MAX_PROB, RANDOM, Shape

if TYPE_CHECKING:
    import numpy as np

KINDS: dict[str, tuple[str, tuple[type, ...]]] = {  # annotation -> valid JSON values, in words and types
    "int": ("a whole number", (int,)),
    "float": ("a number", (float, int)),
    "str": ("a text", (str,)),
    "bool": ("true or false", (bool,)),
}
BEST = "best"  # for training only: the leaf that predicts a unit best (training.loop.selection)
TOKEN, SEGMENT, SEQUENCE = UNITS = ("token", "segment", "sequence")
GATE_EXPECTED = "gate_expected"  # for training only: the mean loss of routes drawn from the gates


def opt(default: Any, about: str) -> Any:
    """A field with its help text for the command line."""
    return field(default=default, metadata={"help": about})


@dataclass
class TrainOptions:
    # --- training length
    epochs: int = opt(3, "passes over the data, when --max-steps is 0")
    max_steps: int = opt(0, "optimizer steps; 0: train for --epochs")
    max_length: int = opt(256, "tokens per training sequence; capped at the model's context")
    batch_size: int = opt(4, "sequences per forward pass and process")
    grad_accum_steps: int = opt(4, "forward passes per optimizer step")
    seed: int = opt(42, "seed of data order and dropout")
    # --- optimizer
    lr: float = opt(2e-5, "learning rate of blocks and embeddings")
    head_lr: float = opt(5e-6, "learning rate of vocabulary heads (a tied head 0 is the embedding: --lr)")
    gate_lr: float = opt(1e-5, "learning rate of gates and head gates")
    weight_decay: float = opt(0.01, "for blocks and embeddings; a tenth for heads and gates, none for norms and biases")
    optimizer: str = opt("adamw", "adamw, or adamw8bit (bitsandbytes)")
    adam_beta1: float = opt(0.9, "decay of the mean gradient")
    adam_beta2: float = opt(0.999, "decay of the mean squared gradient")
    clip_grad_norm: float = opt(1.0, "largest total gradient norm; 0: no clipping")
    warmup_steps: int = opt(1000, "steps of linear warm-up; at most half of the run")
    lr_schedule: str = opt("linear", "after the warm-up: linear (to zero), cosine (to zero) or constant")
    # --- training loss
    train_path_selection: str = opt(
        "gate_soft", "gate_soft, gate_expected, best, gate_hard, max_prob, left_only, right_only, LEAF_only"
    )
    select: str = opt("token", "with best: one leaf for each token (an experiment), segment (of 64 tokens) or sequence")
    select_balance: bool = opt(False, "with best: a leaf takes at most its share of a batch")
    fast_k_loss: bool = opt(False, "minimise the loss under fast-k, as deployed, instead of that of all heads in full")
    lb_coef: float = opt(1e-3, "load balance: gates split the tokens evenly")
    gold_aux_coef: float = opt(1e-3, "gates learn which leaf gives the next token more probability")
    domain_coef: float = opt(0.1, "domains: gates and head gates learn which paths or heads serve a text's domain")
    switch_coef: float = opt(0.0, "steady routes: neighbouring tokens take the same leaf, which is faster on a device")
    next_tokens_coef: float = opt(0.1, "draft heads: each predicts a token further ahead; no effect without them")
    next_tokens_rise: int = opt(0, "steps over which --next-tokens-coef rises from zero")
    next_tokens_detached: bool = opt(False, "draft heads learn, and everything else as if there were none")
    tether_coef: float = opt(5e-4, "KL to a frozen copy of the first head; costs one more head per leaf; 0: off")
    head_lb_coef: float = opt(0.0, "head balance: a leaf uses its heads equally on average")
    head_entropy_coef: float = opt(0.0, "head entropy: every token mixes its heads equally")
    # --- the model's own settings, stored in its config; None: the checkpoint's
    gate_temp: float | None = opt(None, "temperature of gates in gate_soft  [the checkpoint's, 1.2 at first]")
    head_gate_temp: float | None = opt(None, "temperature of head gates  [the checkpoint's, 1.0 at first]")
    head_topk: int | None = opt(None, "heads mixed per token  [the checkpoint's, all at first]")
    fast_k: int | None = opt(None, "candidates of the anchor head when deployed  [the checkpoint's]")
    dropout: float | None = opt(None, "dropout everywhere  [the checkpoint's, 0.1 in GPT-2]")
    # --- freezing
    freeze_head0_steps: int = opt(5000, "freeze head 0 for this many steps (a tied head 0 is the embedding)")
    freeze_all_transformer: bool = opt(False, "train only gates and heads")
    freeze_split_gates: bool = opt(False, "freeze the gates that choose paths")
    head_only_phase: bool = opt(False, "train only heads and head gates")
    head_only_epochs: int = opt(0, "train only heads and head gates for this many passes, then everything")
    freeze_schedule: str | None = opt(None, '{"STEP": {"GROUP": true}} or a JSON file; true freezes from that step')
    # --- logging and saving
    log_every: int = opt(100, "steps between lines in metrics.jsonl")
    eval_every: int = opt(1000, "steps between perplexity evaluations on held-out text; the best model so far is kept")
    save_every: int = opt(5000, "steps between saves of OUT/last, from which --resume continues")
    eval_path_selection: str = opt(
        "gate_hard", "gate_hard (what is deployed), gate_soft, max_prob, random, left_only, right_only, NODE_only"
    )
    eval_length: int = opt(0, "tokens per evaluation window; 0: the model's context")
    eval_stride: int = opt(0, "tokens between starts of windows; 0: half a window")
    eval_max_tokens: int = opt(0, "held-out tokens used, from the start; 0: all")
    tensorboard: bool = opt(False, "also write metrics for TensorBoard to OUT/tensorboard")
    # --- machine
    bf16: bool = opt(False, "matrix products in bfloat16 (weights and losses stay float32)")
    cpu: bool = opt(False, "use the CPU even if there is a GPU")

    def check(self) -> None:
        """Raise InputError naming the first invalid option, alone or combined with the others."""
        self.check_each()
        if self.select_balance and self.train_path_selection != BEST:
            raise FieldError("{select_balance} is for {train_path_selection} best")
        if self.train_path_selection == BEST and not self.gold_aux_coef:
            raise FieldError("with {train_path_selection} best, gates learn by {gold_aux_coef} alone: set it above 0")
        if self.switch_coef and self.freeze_split_gates:
            raise FieldError("{switch_coef} teaches the gates that {freeze_split_gates} keeps: leave one of them out")
        if self.max_steps < 1 and self.epochs < 1:
            raise FieldError("one of {max_steps} and {epochs} must be above 0")

    def check_each(self) -> None:
        """Raise InputError naming the first option that is invalid alone."""
        for name in ("batch_size", "grad_accum_steps", "log_every", "eval_every", "save_every", "max_length"):
            if getattr(self, name) < 1:
                raise FieldError(f"{{{name}}} {{}} must be at least 1", getattr(self, name))
        for name, value in asdict(self).items():
            if type(value) is float and not math.isfinite(value):
                raise FieldError(f"{{{name}}} {{}} must be a number", value)
            if type(value) in (int, float) and value < 0:
                raise FieldError(f"{{{name}}} {{}} must not be negative", value)
        if self.dropout is not None and self.dropout >= 1:
            raise FieldError("{dropout} {} must be below 1", self.dropout)
        choices = {"optimizer": ("adamw", "adamw8bit"), "lr_schedule": ("linear", "cosine", "constant")}
        choices["select"] = UNITS
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise FieldError(f"{{{name}}} '{{}}': choose one of {{}}", getattr(self, name), ", ".join(known))

    def check_installed(self) -> None:
        """Raise InputError naming a package that an option needs and that is not installed."""
        if self.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
            raise FieldError("{optimizer} adamw8bit needs bitsandbytes: {}", install("bnb"))
        if self.tensorboard and find_spec("tensorboard") is None:
            raise FieldError("{tensorboard} needs tensorboard: pip install tensorboard")

    def check_shape(self, shape: Shape) -> Shape:
        """A model's shape with the options applied. Raises InputError if it is invalid or cannot be trained."""
        own = ("gate_temp", "head_gate_temp", "head_topk", "fast_k")
        shape = Shape.of(vars(shape) | {name: getattr(self, name) for name in own if getattr(self, name) is not None})
        leaves = trained_leaves(shape, self)
        if self.switch_coef and (leaves or not shape.splits):
            raise FieldError("{switch_coef} is for gates that choose between paths: {}", (
                f"only {leaves[0]} is trained" if leaves else "this model has no splits"))  # fmt: skip
        if self.train_path_selection == BEST and not shape.splits:
            raise FieldError("{train_path_selection} best is for a model with paths: this one has no splits")
        if (self.next_tokens_rise or self.next_tokens_detached) and not shape.next_tokens:
            name = "next_tokens_rise" if self.next_tokens_rise else "next_tokens_detached"
            raise FieldError(
                f"{{{name}}} is for a model with draft heads: make one with dmpt-export init --next-tokens N"
            )
        shape.leaves_of_mode(self.eval_path_selection)
        eval_windows(self, shape.n_positions)
        return shape

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> TrainOptions:
        """Options from JSON. Raises InputError naming unknown options; `where` names their source."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise InputError(f"{where} holds unknown options: {', '.join(unknown)}")
        for one in fields(cls):
            annotation, _, optional = str(one.type).partition(" | ")
            words, kinds = KINDS[annotation]
            value = values.get(one.name, one.default)
            if type(value) not in kinds and not (optional and value is None):
                raise InputError(f"{where}: {one.name} must be {words}, not {value!r}")
        return cls(**values)


def flag(name: str) -> str:
    """The command-line form of an option."""
    return f"--{name.replace('_', '-')}"


def trained_leaves(shape: Shape, options: TrainOptions) -> list[str] | None:
    """The one leaf that the options train, None for all. Raises InputError for modes that cannot be trained."""
    mode = options.train_path_selection
    mixed = any(len(heads) > 1 for heads in shape.head_allocation.values())
    if options.fast_k_loss and mixed and not (options.fast_k or shape.fast_k):
        raise FieldError("{fast_k_loss} needs {fast_k} K, the number of candidates that will be deployed")
    if mode in (GATE_EXPECTED, BEST):
        return None
    if mode == RANDOM:
        raise FieldError("{train_path_selection} random: random routing is a control for evaluation only")
    try:
        leaves = shape.leaves_of_mode(mode)
    except InputError:
        known = ", ".join(
            [GATE_SOFT, GATE_EXPECTED, BEST, GATE_HARD, MAX_PROB, *(f"{leaf}_only" for leaf in shape.leaves)]
        )
        raise FieldError("unknown {train_path_selection} '{}': choose one of {}", mode, known) from None
    if leaves and len(leaves) > 1:
        names = ", ".join(f"{leaf}_only" for leaf in leaves)
        raise FieldError("{train_path_selection} {} has several leaves: {}", mode, names)
    return leaves


def eval_windows(options: TrainOptions, context: int, tokens: np.ndarray | None = None) -> tuple[int, int]:
    """(length, stride) of the evaluation windows. Raises InputError if they are invalid or score none of `tokens`."""
    length = options.eval_length or context
    stride = options.eval_stride or max(1, length // 2)
    if length > context:
        raise FieldError("{eval_length} {} must be at most the model's context of {}", length, context)
    if stride > length:
        raise FieldError("{eval_stride} {} must be at most the window's length of {}", stride, length)
    if tokens is None:
        return length, stride
    from training.text.windows import windows

    if not any(windows(len(tokens), length, stride)):
        raise FieldError(
            "the evaluation text has {} tokens, and windows of {} advancing by {} score only those after the first {}: "
            "give more text or a smaller {eval_length}",
            len(tokens), length, stride, length - stride,
        )  # fmt: skip
    return length, stride


def read_freeze_schedule(given: str | Path | None) -> dict[int, dict[str, Any]]:
    """{optimizer step: {group: frozen}}, by step, from JSON text or a JSON file. Raises InputError otherwise."""
    if given is None:
        return {}
    try:
        text = str(given)
        raw = json.loads(text if text.startswith("{") else Path(given).read_text(encoding="utf-8"))
        schedule = {int(step): dict(groups) for step, groups in raw.items()}
    except OSError as error:
        raise InputError(f"freeze schedule {given} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f'freeze schedule {given} must look like {{"0": {{"left_path": true}}}} ({error})') from error
    return dict(sorted(schedule.items()))

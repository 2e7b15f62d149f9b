"""The plan of the training evidence: sizes, variants, settings. Data and arithmetic only; training.py runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MB = 10**6
BASE_LR, TUNE_LR = 2e-3, 5e-4  # chosen on the validation text for plain GPT-2 at scale "cpu"


@dataclass(frozen=True)
class Scale:
    """Sizes of texts and models."""

    bytes: dict[str, int]  # of text, see corpus.prepare
    vocab: int
    layers: int
    width: int
    heads: int  # attention heads, each width / heads wide
    context: int  # tokens, in training and in evaluation
    batch: int  # sequences per step
    base_steps: int
    tune_steps: int
    fast_k: int  # candidates, if fast-k is on
    split: int  # block where the dual model splits
    second_split: int  # block where the quad model splits again
    warmup: int = 50
    tune_lr: float = TUNE_LR
    valid_tokens: int = 50_000  # of held-out text, scored after a run

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context


ALL = 10**12  # bytes: the whole file
SCALES = {
    "toy": Scale(
        bytes={"base": 200_000, "tune": 100_000, "tune_wiki2": 50_000, "valid": 20_000, "test": 20_000},
        vocab=400, layers=4, width=16, heads=2, context=32, batch=4, base_steps=12, tune_steps=6, fast_k=16,
        split=2, second_split=3, warmup=2, valid_tokens=1000,
    ),
    "cpu": Scale(
        bytes={"base": 40 * MB, "tune": 12 * MB, "tune_wiki2": 3 * MB, "valid": ALL, "test": ALL},
        vocab=4096, layers=4, width=128, heads=4, context=256, batch=16, base_steps=2500, tune_steps=500, fast_k=64,
        split=2, second_split=3, warmup=100,
    ),
    # The base is left early and tuned warm: what paths and heads gain shows after a fifth of the operations of "cpu".
    "pilot": Scale(
        bytes={"base": 40 * MB, "tune": 12 * MB, "tune_wiki2": 3 * MB, "valid": ALL, "test": ALL},
        vocab=4096, layers=4, width=128, heads=4, context=256, batch=16, base_steps=1000, tune_steps=500, fast_k=64,
        split=2, second_split=3, warmup=100, tune_lr=1e-3,
    ),
    # The base of "pilot", then three times as long at nearly the base's rate, on text of which no line is seen twice.
    "warm": Scale(
        bytes={"base": 40 * MB, "tune": 40 * MB, "tune_wiki2": 3 * MB, "valid": ALL, "test": ALL},
        vocab=4096, layers=4, width=128, heads=4, context=256, batch=16, base_steps=1000, tune_steps=1500, fast_k=64,
        split=2, second_split=3, warmup=100, tune_lr=1.5e-3,
    ),
}  # fmt: skip

# The settings of every run, chosen on the validation text for plain GPT-2, so that the control is not at a
# disadvantage. Gates use the learning rate of the blocks; so do heads, or 3x if a path has several.
COMMON: dict[str, Any] = {"adam_beta2": 0.99, "weight_decay": 0.1, "dropout": 0.0, "lr_schedule": "linear"}
# A tether would tie heads to a base that has seen little text; freezing head 0 would also freeze the embedding.
DMPT = {"tether_coef": 0.0, "freeze_head0_steps": 0, "lb_coef": 0.01, "gold_aux_coef": 0.01}
# Paths and heads are trained as deployed: one path per token, the anchor's candidates.
PATHS = {"train_path_selection": "gate_expected", "gate_temp": 1.0}
BEST = {"train_path_selection": "best", "select_balance": True, "gold_aux_coef": 0.1, "lb_coef": 0.0}
SOFT = {"train_path_selection": "gate_soft", "gate_temp": 1.2}
# How the heads of a leaf get their vocabulary matrices: fields of the configuration
HEADS: dict[str, dict[str, Any]] = {
    "full": {"head_kind": "full"},
    "projected": {"head_kind": "projected", "shared_anchor": False},
    "one-anchor": {"head_kind": "projected", "shared_anchor": True},
}


@dataclass(frozen=True)
class Variant:
    about: str
    splits: int = 0  # number of splits on a path
    heads: int = 1  # total vocabulary heads
    kind: str = "full"  # of HEADS
    tuned: bool = True  # False: the base unchanged
    flops_of: str | None = None  # train for as many operations as this variant, not for as many tokens
    train: dict[str, Any] = field(default_factory=dict)  # options that differ from the common ones
    init: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        return not self.splits and self.heads == 1

    @property
    def leaves(self) -> int:
        return 2**self.splits

    def fast_k(self, scale: Scale) -> int:
        """Candidates when deployed; 0 if each path has a single head."""
        return scale.fast_k if self.heads > self.leaves else 0


VARIANTS = {
    "base": Variant("GPT-2, not trained further", tuned=False),
    "gpt2": Variant("GPT-2, trained further on the same tokens"),
    "dual": Variant("two paths, one head each", splits=1, heads=2),
    "multi-head": Variant("one path, four heads", heads=4),
    "dual-heads": Variant("two paths, four heads each", splits=1, heads=8),
    "quad": Variant("four paths, one head each", splits=2, heads=4),
    "multi-head-projected": Variant("one path, four heads, three of them projected", 0, 4, "projected"),
    "dual-projected": Variant("two paths, four heads each, three of them projected", 1, 8, "projected"),
    "dual-one-anchor": Variant("two paths, eight heads, one vocabulary matrix", 1, 8, "one-anchor"),
    "dual-steady": Variant("dual with steady routes", 1, 2, train={"switch_coef": 0.03}),
    "dual-one-anchor-balanced": Variant(
        "one vocabulary matrix, gates held to balance", 1, 8, "one-anchor", train={"lb_coef": 0.1}
    ),
    "dual-one-anchor-steady": Variant(
        "one vocabulary matrix, steady and balanced routes", 1, 8, "one-anchor",
        train={"switch_coef": 0.03, "lb_coef": 0.1},
    ),
    "gpt2-flops": Variant("GPT-2, trained for as many operations as dual", flops_of="dual"),
    "dual-soft": Variant("dual trained with gate_soft, but deployed with gate_hard", 1, 2, train=SOFT),
    "multi-head-full": Variant("multi-head trained with all heads in full", heads=4, train={"fast_k_loss": False}),
    "dual-hard": Variant(
        "dual trained with gate_hard, gates taught by gold-aux", 1, 2,
        train={"train_path_selection": "gate_hard", "gold_aux_coef": 0.1},
    ),
    "gpt2-flops-heads": Variant("GPT-2, trained for as many operations as dual-heads", flops_of="dual-heads"),
}  # fmt: skip

# Settings that might help or hurt paths and heads: compared on the validation text only.
TRIALS = {
    "gpt2": VARIANTS["gpt2"],
    "dual": VARIANTS["dual"],
    "multi-head": VARIANTS["multi-head"],
    "dual-heads": VARIANTS["dual-heads"],
    "quad": VARIANTS["quad"],
    "gpt2 lr x2": Variant("", train={"lr": 2 * TUNE_LR}),
    "gpt2 lr x0.5": Variant("", train={"lr": TUNE_LR / 2}),
    "dual soft": VARIANTS["dual-soft"],
    "dual hard": VARIANTS["dual-hard"],
    "dual lr x2": Variant("", 1, 2, train={"lr": 2 * TUNE_LR, "head_lr": 2 * TUNE_LR}),
    "dual gate lr x5 no balance": Variant(
        "", 1, 2, train={"gate_lr": 5 * TUNE_LR, "lb_coef": 0.0, "gold_aux_coef": 0.0}
    ),
    "dual split early": Variant("", 1, 2, init={"splits": "1"}),
    "dual gate temp 0.5": Variant("", 1, 2, train={"gate_temp": 0.5}),
    "one-anchor": VARIANTS["dual-one-anchor"],
    "one-anchor balanced": VARIANTS["dual-one-anchor-balanced"],
    "one-anchor quad": Variant("", 2, 16, "one-anchor"),
    "one-anchor 16 heads": Variant("", 1, 16, "one-anchor"),
    "one-anchor split early": Variant("", 1, 8, "one-anchor", init={"splits": "1"}),
    "one-anchor rank 64": Variant("", 1, 8, "one-anchor", init={"head_rank": 64}),
    "one-anchor best": Variant(
        "", 1, 8, "one-anchor", train={"train_path_selection": "best", "gold_aux_coef": 0.1, "lb_coef": 0.0}
    ),
    "one-anchor best sequence": Variant("", 1, 8, "one-anchor", train=BEST | {"select": "sequence"}),
    "one-anchor best segment": Variant("", 1, 8, "one-anchor", train=BEST | {"select": "segment"}),
    "multi-head full": VARIANTS["multi-head-full"],
    "multi-head noise 0.5": Variant("", heads=4, init={"noise": 0.5}),
    "multi-head head lr x1": Variant("", heads=4, train={"head_lr": TUNE_LR}),
}


def splits_of(variant: Variant, scale: Scale) -> list[int]:
    return [scale.split, scale.second_split][: variant.splits]


def flops_per_token(variant: Variant, scale: Scale) -> int:
    """Multiplications and additions of a forward pass in training, which computes every path and head.

    Counts matrix products and causal attention (half the context on average), but not the small gates.
    """
    width, bounds = scale.width, [0, *splits_of(variant, scale), scale.layers]
    blocks = sum(2**depth * (bounds[depth + 1] - bounds[depth]) for depth in range(len(bounds) - 1))
    block = 2 * 12 * width * width + 2 * scale.context * width
    matrices = variant.heads if variant.kind == "full" else variant.leaves  # multiplied in full
    projections = variant.heads - (1 if variant.kind == "one-anchor" else matrices)
    candidates = (variant.heads - matrices) * scale.fast_k
    return blocks * block + 2 * width * (matrices * scale.vocab + projections * width + candidates)


def steps_of(variant: Variant, scale: Scale, variants: dict[str, Variant] = VARIANTS) -> int:
    """Optimizer steps after the base's."""
    if not variant.tuned:
        return 0
    if variant.flops_of is None:
        return scale.tune_steps
    ratio = flops_per_token(variants[variant.flops_of], scale) / flops_per_token(variant, scale)
    return round(scale.tune_steps * ratio)


def train_options(variant: Variant, scale: Scale, seed: int, steps: int, lr: float) -> list[str]:
    """Options of `dmpt-export train` for one run."""
    fast_k = variant.fast_k(scale)
    values: dict[str, Any] = {
        "max_length": scale.context, "batch_size": scale.batch, "grad_accum_steps": 1, "max_steps": steps,
        "warmup_steps": scale.warmup, "lr": lr, "head_lr": lr, "gate_lr": lr, "seed": seed, "log_every": 50,
        "eval_every": 10**9, "save_every": 10**9, "eval_max_tokens": scale.valid_tokens, **COMMON,
        **({} if variant.plain else DMPT), **(PATHS if variant.splits else {}),
        **({"fast_k": fast_k, "fast_k_loss": True, "head_lr": 3 * lr} if fast_k else {}), **variant.train,
    }  # fmt: skip
    return as_options(values)


def init_options(variant: Variant, scale: Scale, seed: int) -> list[str]:
    """Options of `dmpt-export init` for one run."""
    splits = ",".join(map(str, splits_of(variant, scale))) or "none"
    values = {"splits": splits, "heads": variant.heads, "seed": seed, **HEADS[variant.kind], **variant.init}
    return as_options(values) + (["--no-shared-anchor"] if values.get("shared_anchor") is False else [])


def as_options(values: dict[str, Any]) -> list[str]:
    """Fields as options of the command line; one that is true is a flag, one that is false is left out."""
    given = {f"--{name.replace('_', '-')}": value for name, value in values.items() if value is not False}
    return [part for name, value in given.items() for part in ([name] if value is True else [name, str(value)])]


def evaluations(variant: Variant, scale: Scale, controls: bool = True) -> list[tuple[str, int]]:
    """(path mode, fast-k) of each measurement of a trained variant: first as deployed, then the controls."""
    out = [("gate_hard", variant.fast_k(scale))]
    if controls and variant.fast_k(scale):
        out.append(("gate_hard", 0))
    if controls and variant.splits:
        out += [(mode, variant.fast_k(scale)) for mode in ("random", "gate_soft")]
    if controls and variant.leaves == 2:
        out += [(mode, variant.fast_k(scale)) for mode in ("left_only", "right_only")]
    return out

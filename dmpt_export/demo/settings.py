"""Every number the demo depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.loop.options import TrainOptions


@dataclass(frozen=True)
class Settings:
    """Settings for a demo of three to eight minutes on two idle cores."""

    # the model: a GPT-2 of a few million parameters
    vocab_size: int = 4096
    context: int = 256  # tokens
    n_embd: int = 192
    n_layer: int = 6  # the DMPT splits at half of it
    n_head: int = 6
    # the DMPT
    heads: int = 8  # four on each path
    fast_k: int = 64  # candidates that the three other heads of a path score
    noise: float = 1e-3  # a projected head that is no anchor changes its input by ten times this share
    gate_hidden: int = 64
    # training; both fine-tunings see the same sequences in the same order
    batch_size: int = 2  # sequences of `context` tokens; many small steps learn so little text best
    base_steps: int = 1000
    tune_steps: int = 300
    base_lr: float = 2e-3
    tune_lr: float = 1e-3
    # comparison
    schemes: tuple[str, ...] = ("int8", "int4")
    prompt: int = 128  # tokens of the timed prompt
    gen: int = 64  # tokens decoded after it
    repetitions: int = 3
    # generation
    new_tokens: int = 80
    temperature: float = 0.7
    top_k: int = 40

    def scaled(self, factor: float) -> Settings:
        """The same settings with `factor` times the training steps, at least one."""
        return replace(
            self,
            base_steps=max(1, round(self.base_steps * factor)),
            tune_steps=max(1, round(self.tune_steps * factor)),
        )

    def training(self, steps: int, lr: float, seed: int) -> TrainOptions:
        """Options for all three training runs; plain GPT-2 ignores those of gates and further heads."""
        from training.loop.options import TrainOptions

        return TrainOptions(
            max_steps=steps,
            max_length=self.context,
            batch_size=self.batch_size,
            grad_accum_steps=1,
            seed=seed,
            lr=lr,
            head_lr=3 * lr,  # each further head of a path sees the same tokens, but must move away from its copy
            gate_lr=lr,
            adam_beta2=0.95,  # short runs: the squared gradient's mean must settle in tens of steps
            weight_decay=0.1,
            warmup_steps=max(1, steps // 10),
            lr_schedule="linear",
            # as deployed: one path per token, heads mixed on the anchor's candidates
            train_path_selection="gate_expected",
            fast_k_loss=True,
            gate_temp=1.0,
            tether_coef=0.0,
            lb_coef=0.1,
            gold_aux_coef=0.02,
            freeze_head0_steps=0,
            dropout=0.0,  # less than two passes over the text
            log_every=50,
            eval_every=steps,
            save_every=steps,
            cpu=True,  # so that the demo is the same everywhere
        )

"""The training loop: `train(model, tokens, options, out)`. training.loop.state describes the files that it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from training.checkpoints.checkpoint import save_model
from training.checkpoints.earlier import RUN, SAVED, settle
from training.checkpoints.lock import working_in
from training.checkpoints.record import FIELD, Record, record_of
from training.errors import FieldError
from training.loop import setup, state
from training.loop.evaluation import Evaluation, evaluate
from training.loop.freeze import Freezer
from training.loop.interrupt import Interrupted, StopRequest, stop_on_signals
from training.loop.objective import Loss, Objective
from training.loop.optim import DRAFT_PREFIX, collect_gradients, lr_factor, make_optimizer, set_lr
from training.loop.options import TrainOptions, eval_windows, flag, read_freeze_schedule, trained_leaves
from training.loop.phase import note_best_of, phase_of
from training.loop.watch import Meter, Watcher, perplexity
from training.model.generation import DMPTForCausalLM
from training.model.nonfinite import NonFiniteError, first_bad_number, first_bad_tensor
from training.text.batches import TokenBatches
from training.text.domains import Domains

CHECKED = 64  # positions of a sequence whose log-probs are looked at before saving


@dataclass
class TrainResult:
    folder: Path  # folder of the model to use: the best on held-out text, else the last
    steps: int
    tokens: int  # trained on, over the whole run
    loss: float  # training nll per token, mean since the last log line
    eval_loss: float | None  # held-out nll of the last model; None without evaluation data
    best_loss: float | None  # held-out nll of the best model
    seconds: float  # over the whole run


@dataclass(frozen=True)
class Extras:
    """What goes along with a run and changes nothing in its course."""

    tokenizer_from: str | os.PathLike[str] | None = None  # model folder whose tokenizer goes into the checkpoints
    about: dict[str, Any] | None = None  # anything JSON can hold, stored with the trainer state
    source: str | os.PathLike[str] | None = None  # model folder that is trained, for the license on the new cards
    title: str | None = "training"  # of the bar on stderr, when that is a terminal; None: no bar


def train(
    model: DMPTForCausalLM,
    tokens: np.ndarray,
    options: TrainOptions,
    out: str | os.PathLike[str],
    eval_tokens: np.ndarray | None = None,
    *,
    domains: Domains | None = None,
    resume: bool | str | os.PathLike[str] = False,
    overwrite: bool = False,
    extras: Extras | None = None,
) -> TrainResult:
    """Train `model` in place on `tokens` [n]; leaves it in eval mode, with the weights of the last step.

    out: the run's folder, see training.loop.state; after training also a model folder itself.
    eval_tokens: held-out tokens; OUT/best keeps the model with the lowest loss on them.
    domains: of the training tokens; what serves them is in the model's configuration, else they share out its paths.
    resume: True continues OUT/last, a path continues that run; its weights replace the model's.
    overwrite: replace an existing run, which is kept until the new one has saved its first checkpoint.
    extras: see Extras.

    Raises InputError for options or data that cannot be used and where another run works in `out`, NonFiniteError
    (naming step and tensor) when a loss, or a weight that would be saved, is not finite, and Interrupted after
    Ctrl-C or SIGTERM, once the run is saved.
    """
    started, extras = time.monotonic(), extras or Extras()
    main = PartialState(cpu=setup.on_cpu(options)).is_main_process
    with working_in(out, "train") if main else contextlib.nullcontext():
        try:
            trainer = Trainer(model, tokens, options, Path(out), eval_tokens, domains, resume, overwrite, extras)
            trainer.progress.about = extras.about or trainer.progress.about
            started -= trainer.progress.seconds  # of earlier calls, which this one continues
            with contextlib.closing(trainer.watcher(extras.title)) as watcher, stop_on_signals() as stop:
                return trainer.run(watcher, stop, started)
        finally:
            settle(Path(out), RUN, SAVED)  # restores an earlier run if this one has saved nothing
            model.eval()


class Trainer:
    """One run. It depends only on the options and `progress`, so a resumed run repeats it bitwise."""

    def __init__(
        self,
        model: DMPTForCausalLM,
        tokens: np.ndarray,
        options: TrainOptions,
        out: Path,
        eval_tokens: np.ndarray | None,
        domains: Domains | None,
        resume: bool | str | os.PathLike[str],
        overwrite: bool,
        extras: Extras,
    ) -> None:
        options.check()
        options.check_installed()
        self.options, self.out, self.extras = options, out, extras
        self.accelerator = Accelerator(gradient_accumulation_steps=options.grad_accum_steps, cpu=setup.on_cpu(options))
        torch.manual_seed(options.seed + self.accelerator.process_index)
        self.model = model
        setup.apply_to_config(model, options)
        self.length = min(options.max_length, model.config.n_positions)
        names = setup.domains_to_config(model.config, domains)
        self.batches = TokenBatches(tokens, self.length, options.seed)
        if domains is not None:
            self.batches.labels = domains.of_windows(len(self.batches), self.length)
        setup.check_tokens(tokens, eval_tokens, model.config.vocab_size)
        self.eval_tokens = None if eval_tokens is None else eval_tokens[: options.eval_max_tokens or None]
        self.eval_windows = eval_windows(options, model.config.n_positions, self.eval_tokens)
        self.per_pass = options.batch_size * self.accelerator.num_processes  # sequences
        self.per_step = self.per_pass * options.grad_accum_steps
        self.epoch_steps = max(1, len(self.batches) // self.per_step)
        self.total = options.max_steps or max(1, options.epochs * len(self.batches) // self.per_step)

        self.freezer = Freezer(model, options, read_freeze_schedule(options.freeze_schedule), self.epoch_steps)
        trained_leaves(model.config, options)  # refuse invalid options before anything is written
        model.config.leaves_of_mode(options.eval_path_selection)

        if self.accelerator.is_main_process:
            setup.prepare_folder(out, resume, overwrite)
        self.accelerator.wait_for_everyone()
        folder = setup.resume_folder(out, resume)
        if folder is not None:
            setup.load_weights(model, folder)
        model.to(self.accelerator.device)
        self.objective = Objective(model, options, self.across, names)
        self.optimizer = make_optimizer(model, options)
        crc = zlib.crc32(tokens.data)
        data: dict[str, Any] = {"tokens": len(tokens), "crc32": crc, "length": self.length, "seed": options.seed}
        self.domains = domains
        if domains is not None:
            served = {name: (model.config.domains or {})[name] for name in names}
            data |= {"domains": json.dumps(served), "domains_crc32": domains.crc32()}
        self.notes: list[str] = []
        self.record = record_of(model.config, model.named_parameters())
        self.progress = state.Progress(options=dataclasses.asdict(options), data=data, record=self.record.to_json())
        if folder is not None:
            self.restore(folder)
        self.meter = Meter(self.progress.meter, self.across)
        self.evaluation: Evaluation | None = None

    # --- starting and resuming ------------------------------------------------------------------------

    def restore(self, folder: Path) -> None:
        """Restore optimizer, data position, random numbers and the tether's reference of a saved run."""
        saved, scalars, files = state.load_run(folder)
        for name in {**saved.data, **self.progress.data}:
            if saved.data.get(name) != (value := self.progress.data.get(name)):
                raise FieldError(
                    "cannot resume {}: {} of the training data was {} and is now {}: give the same text, tokenizer, "
                    "domains, {max_length} and {seed}",
                    folder, name, saved.data.get(name), value,
                )  # fmt: skip
        for name, value in self.progress.options.items():
            before = saved.options.get(name, getattr(TrainOptions, name))  # an older run lacks newer options
            if before != value:
                self.notes.append(f"resuming with {flag(name)} {value} (before: {before})")
        state.restore_optimizer(self.optimizer, files["optimizer"], scalars)
        state.restore_rng(self.accelerator, files["rng"])
        if self.objective.reference is not None and "tether" in files:
            self.objective.reference.copy_(files["tether"]["heads.0.weight"])
        self.record = Record.from_json(saved.record) or self.record
        options, data = self.progress.options, self.progress.data
        self.progress = dataclasses.replace(saved, options=options, data=data, finished=saved.step >= self.total)

    def watcher(self, title: str | None) -> Watcher:
        main, board = self.accelerator.is_main_process, self.options.tensorboard
        leaves = self.model.config.leaves
        watcher = Watcher(self.out, leaves, self.total, self.progress.step, title, main, board)
        for note in self.notes:
            watcher.say(note)
        if self.length < self.model.config.n_positions:
            watcher.say(
                f"Training on {self.length} tokens at a time: positions {self.length} to "
                f"{self.model.config.n_positions - 1} of the model's context are not trained by this run"
            )
        return watcher

    # --- the loop -------------------------------------------------------------------------------------

    def run(self, watcher: Watcher, stop: StopRequest, started: float) -> TrainResult:
        progress, options = self.progress, self.options
        loss, self.started = math.nan, started
        while progress.step < self.total:
            loss = self.step()
            watcher.step(self.per_step * self.length, loss, self.meter)
            done = progress.step == self.total
            if done or progress.step % options.log_every == 0:
                loss = watcher.log(progress.step, self.meter, lr=self.lr(), seconds=time.monotonic() - started)["nll"]
            evaluates = done or progress.step % options.eval_every == 0
            if evaluates:
                self.check_finite()  # the best model is saved
                self.evaluate(watcher)
            stopped = self.agreed(stop)
            if done or stopped or progress.step % options.save_every == 0:
                if not evaluates:
                    self.check_finite()
                progress.finished = done
                self.save()
            if stopped and not done:
                raise Interrupted(
                    f"stopped by {stopped} after step {progress.step} of {self.total}; saved in {self.out / 'last'}: "
                    "continue with the same command and --resume"
                )
        folder = self.publish()
        eval_loss = self.evaluation.loss if self.evaluation else None
        tokens, seconds = progress.position * self.length, time.monotonic() - started
        return TrainResult(folder, progress.step, tokens, loss, eval_loss, progress.best_loss, seconds)

    def step(self) -> float:
        """One optimizer step; returns the newest nll. Raises NonFiniteError before the weights change."""
        self.freezer.apply(self.progress.step)
        set_lr(self.optimizer, lr_factor(self.progress.step, self.total, self.options))
        self.objective.step = self.progress.step
        for _ in range(self.options.grad_accum_steps):
            rank = self.accelerator.process_index
            place = self.progress.position + rank * self.options.batch_size, self.options.batch_size
            self.progress.position += self.per_pass
            ids = self.batches.take(*place).to(self.accelerator.device, non_blocking=True)
            if (domains := self.batches.domains(*place)) is not None:
                domains = domains.to(self.accelerator.device)
            loss = self.forward(ids, domains)
            self.meter.add(loss)
            self.accelerator.backward(loss.total)  # divides by the number of passes
        apart = DRAFT_PREFIX if self.options.next_tokens_detached else None
        norm = collect_gradients(self.model, self.accelerator, self.options.clip_grad_norm, apart)
        newest = self.meter.flush()
        if not math.isfinite(self.meter.sums["loss"]) or not math.isfinite(norm):
            where = first_bad_tensor(self.model, lambda: self.forward(ids, domains).terms)
            raise self.not_finite(self.progress.step + 1, where)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return newest["nll"]

    def check_finite(self) -> None:
        """Raise NonFiniteError unless weights, moments and log-probs of one sequence are finite: finite weights can be
        so large that no output is. Draws no random numbers, so that it changes nothing in the run's course."""
        ids = self.batches.sample()[:, :-1].to(self.accelerator.device)  # the same in every process
        how = self.options.eval_path_selection, self.model.config.fast_k, min(CHECKED, self.length)
        self.model.eval()
        where = first_bad_number(self.model, self.optimizer, lambda: {"log-probs": self.model.log_probs(ids, *how)})
        self.freezer.training_mode()
        if where is not None:
            raise self.not_finite(self.progress.step, f"after the step {where}")

    def not_finite(self, step: int, where: str) -> NonFiniteError:
        kept = self.out / "last"
        state = f"{kept} keeps the last saved checkpoint" if kept.is_dir() else "nothing was saved"
        return NonFiniteError(
            f"step {step}: {where} is not finite; {state}: lower the learning rates or lengthen the warm-up"
        )

    def forward(self, ids: Tensor, domains: Tensor | None) -> Loss:
        with self.autocast():
            return self.objective(ids, domains=domains)

    def across(self, value: Tensor) -> Tensor:
        """Mean over the processes."""
        mean: Tensor = self.accelerator.reduce(value, "mean")
        return mean

    def autocast(self) -> AbstractContextManager[None]:
        wanted = self.options.bf16 or self.accelerator.mixed_precision == "bf16"
        context: AbstractContextManager[None] = torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=wanted
        )
        return context

    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def agreed(self, stop: StopRequest) -> str | None:
        """The signal that any process received, known to all processes at the same step."""
        if self.accelerator.num_processes == 1:
            return stop.name
        flag = torch.tensor(float(stop.name is not None), device=self.accelerator.device)
        return (stop.name or "a signal") if self.accelerator.reduce(flag, "sum").item() else None

    # --- evaluating and saving ------------------------------------------------------------------------

    def evaluate(self, watcher: Watcher) -> None:
        """Held-out loss of the model as deployed; saves the best model so far in OUT/best."""
        if self.eval_tokens is None:
            return
        progress, mode = self.progress, self.options.eval_path_selection
        self.model.eval()
        result = evaluate(self.model, self.eval_tokens, *self.eval_windows, mode, self.accelerator)
        self.freezer.training_mode()
        self.evaluation = result
        best = progress.best_loss is None or result.loss < progress.best_loss
        watcher.write(
            {
                "step": progress.step,
                "eval_loss": result.loss,
                "eval_perplexity": perplexity(result.loss),
                "eval_accuracy": result.accuracy,
                "eval_tokens": result.tokens,
                "best": best,
            }
        )
        if best and math.isfinite(result.loss):
            progress.best_loss = result.loss
            if self.accelerator.is_main_process:
                self.note_training()
                save_model(self.model, self.out / "best", self.extras.tokenizer_from, source=self.extras.source)
            self.accelerator.wait_for_everyone()

    def save(self) -> None:
        self.progress.meter, self.progress.seconds = dict(self.meter.sums), time.monotonic() - self.started
        rng = state.rng_state(self.accelerator)
        if self.accelerator.is_main_process:
            self.note_training()
            tensors = {"rng": rng}
            if self.objective.reference is not None:
                tensors["tether"] = {"heads.0.weight": self.objective.reference.cpu().contiguous()}
            if self.domains is not None:
                tensors["domains"] = state.domain_tensors(self.domains)
            sources = self.extras.tokenizer_from, self.extras.source
            state.save_run(self.out / "last", self.model, self.optimizer, self.progress, tensors, *sources)
            settle(self.out, RUN, SAVED)
        self.accelerator.wait_for_everyone()

    def note_training(self) -> None:
        """Record this run, up to now, in the model's configuration."""
        phase = phase_of(self.model, self.options, self.progress, self.length, self.per_step * self.length)
        setattr(self.model.config, FIELD, self.record.with_phase(phase).to_json())

    def publish(self) -> Path:
        """Publish the model to use in OUT itself."""
        source, best = self.out / "last", self.out / "best"
        if self.accelerator.is_main_process:
            if self.progress.best_loss is not None and best.is_dir():
                note_best_of(best, self.progress.position * self.length)
                source = best
            state.publish(source, self.out)
        self.accelerator.wait_for_everyone()
        return self.out

"""The demo's stages, in order; each calls the same functions as the verb of that name.

corpus -> tokenizer -> base GPT-2 --+--> fine-tuned GPT-2 --------+--> int8, int4 --> ONNX --> comparison
                                    +--> DMPT --> fine-tuned DMPT-+                     +--> text
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmpt_export import __version__
from dmpt_export.demo.corpus import Corpus, documentation_corpus, text_corpus
from dmpt_export.demo.folder import begin, check_out, finish, publish, write
from dmpt_export.demo.settings import Settings
from training.checkpoints.lock import working_in
from training.errors import FieldError
from training.text.sources import read_text
from training.text.tokenizer import load_tokenizer
from training.text.windows import encode_lines, end_of_text_id, train_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.comparison.result import Comparison
    from training.loop.options import TrainOptions
    from training.model.generation import DMPTForCausalLM

BASE, TUNED, INIT, DMPT = "gpt2-base", "gpt2-tuned", "dmpt-init", "dmpt"  # checkpoints, in the order they are made
LABELS = {BASE: "GPT-2 base", TUNED: "GPT-2 fine-tuned", DMPT: "DMPT"}
N_STAGES = 9


@dataclass(frozen=True)
class Texts:
    """The corpus as files, and their tokens."""

    train: Path
    held_out: Path
    train_tokens: np.ndarray  # int32 [n]
    held_out_tokens: np.ndarray


class Demo:
    """One run into the folder `out`; `run()` does everything and returns the comparison."""

    def __init__(self, out: Path, data: Sequence[Path], seed: int, settings: Settings) -> None:
        self.out, self.data, self.seed, self.settings = out, list(data), seed, settings
        self.stage = 0
        self.started = time.monotonic()

    def run(self) -> Comparison:
        """Raises InputError for unusable data or an `out` that is not from a demo, before anything is written."""
        check_out(self.out)
        with working_in(self.out, "demo"):
            return self.stages()

    def stages(self) -> Comparison:
        given = self.given_text()
        with self.heading("Corpus: your text" if given else "Corpus: the documentation inside this Python"):
            corpus = given or documentation_corpus()
        with self.heading(f"Tokenizer: byte-level BPE of {self.settings.vocab_size} entries"):
            texts = self.tokenize(corpus)
        self.train_models(texts)
        with self.heading(f"Quantize: {', '.join(self.settings.schemes)}"):
            self.quantize()
        with self.heading("Export to ONNX, each checked against torch"):
            self.export()
        with self.heading(f"Text written by the {self.settings.schemes[0]} DMPT through ONNX Runtime"):
            self.generate(corpus.held_out)
        with self.heading("Comparison on held-out text"):
            result = self.compare(texts)
        finish(self.out)
        return result

    @contextmanager
    def heading(self, title: str) -> Iterator[None]:
        """Print the stage that begins, and its duration at the end."""
        self.stage += 1
        say(f"\n[{self.stage}/{N_STAGES}] {title}")
        started = time.monotonic()
        yield
        say(f"      {time.monotonic() - started:.1f} s ({time.monotonic() - self.started:.0f} s in total)")

    # --- text ---------------------------------------------------------------------------------

    def given_text(self) -> Corpus | None:
        return text_corpus({str(path): read_text(path) for path in self.data}) if self.data else None

    def tokenize(self, corpus: Corpus) -> Texts:
        """Train the tokenizer; write it, the texts and their token counts. Creates the folder, or clears it."""
        tokenizer = train_tokenizer(corpus.train.split("\n"), self.settings.vocab_size)
        eot = end_of_text_id(tokenizer)
        train, held_out = (encode_lines(text, tokenizer, eot) for text in (corpus.train, corpus.held_out))
        if min(len(train), len(held_out)) <= self.settings.context:
            raise FieldError(
                "the text has {} tokens to train on and {} held out, but more than {} each are needed: give more with "
                "{data}",
                f"{len(train):,}", f"{len(held_out):,}", self.settings.context,
            )  # fmt: skip
        if begin(self.out, self.record(corpus)):
            say(f"      going on with the demo that was stopped in {self.out}")
        write(self.out / "tokenizer" / "tokenizer.json", tokenizer.to_str())
        train_file, held_out_file = (self.out / "corpus" / name for name in ("train.txt", "held_out.txt"))
        write(train_file, corpus.train)
        write(held_out_file, corpus.held_out)
        say(
            f"      {corpus.n_bytes / 1e6:.2f} MB of text: {len(train):,} tokens to train on, "
            f"{len(held_out):,} held out, {len(corpus.train.encode()) / len(train):.2f} bytes per token"
        )
        return Texts(train_file, held_out_file, train, held_out)

    def record(self, corpus: Corpus) -> dict[str, Any]:
        """What a run depends on, as JSON gives it back; a stopped run goes on only where all of it is the same."""
        text = hashlib.sha256(f"{len(corpus.train)} {corpus.train}{corpus.held_out}".encode()).hexdigest()
        values: dict[str, Any] = json.loads(json.dumps(asdict(self.settings)))
        return {"version": __version__, "seed": self.seed, "text_sha256": text, **values}

    # --- models -------------------------------------------------------------------------------

    def train_models(self, texts: Texts) -> None:
        """Train the base GPT-2, then fine-tune it and the DMPT made from it on the same further tokens."""
        from training.checkpoints.checkpoint import load_model, save_model
        from training.model.init import init_from_gpt2
        from training.model.new_shape import NewShape
        from training.model.shape import PROJECTED

        s = self.settings
        tune = s.training(s.tune_steps, s.tune_lr, self.seed + 1)
        with self.heading(f"Train the base GPT-2: {s.n_layer} blocks, {s.n_embd} wide"):
            self.fit(self.new_gpt2(), BASE, s.training(s.base_steps, s.base_lr, self.seed), texts)
        with self.heading("Fine-tune GPT-2"):
            self.fit(load_model(self.checkpoint(BASE)), TUNED, tune, texts)
        with self.heading(f"Fine-tune the DMPT: split at {s.n_layer // 2}, {s.heads} heads, on the same tokens"):
            dmpt = init_from_gpt2(
                load_model(self.checkpoint(BASE)),
                NewShape(
                    heads=s.heads, fast_k=s.fast_k, gate_hidden=s.gate_hidden, head_kind=PROJECTED, shared_anchor=True
                ),
                noise=s.noise,
                seed=self.seed,
            )
            save_model(dmpt, self.checkpoint(INIT), tokenizer_from=self.out / "tokenizer")
            self.fit(dmpt, DMPT, tune, texts)

    def checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / name

    def new_gpt2(self) -> DMPTForCausalLM:
        """A GPT-2 with random weights: a model without splits and with a single tied head."""
        import torch

        from training.model.config import DMPTConfig
        from training.model.generation import DMPTForCausalLM
        from training.model.shape import ROOT

        tokenizer = load_tokenizer(self.out / "tokenizer")
        eot, s = end_of_text_id(tokenizer), self.settings
        config = DMPTConfig(
            vocab_size=tokenizer.get_vocab_size(), n_positions=s.context, n_embd=s.n_embd, n_layer=s.n_layer,
            n_head=s.n_head, head_allocation={ROOT: [0]}, bos_token_id=eot, eos_token_id=eot,
        )  # fmt: skip
        torch.manual_seed(self.seed)
        return DMPTForCausalLM(config)

    def fit(self, model: DMPTForCausalLM, name: str, options: TrainOptions, texts: Texts) -> None:
        """Train into checkpoints/`name`, which then holds the model alone, without the optimizer's state."""
        from training.loop.interrupt import Interrupted
        from training.loop.trainer import Extras, train

        folder = self.checkpoint(name)
        goes_on = (folder / "last").is_dir()
        if (folder / "config.json").is_file() and not goes_on:
            say(f"      {name}: trained before the demo was stopped")
            return
        try:
            extras = Extras(self.out / "tokenizer", title=name)
            result = train(model, texts.train_tokens, options, folder, resume=goes_on, extras=extras)
        except Interrupted:  # its message is about `train`
            say("      the training so far is saved: the same command goes on from here")
            raise KeyboardInterrupt from None
        shutil.rmtree(folder / "last")
        say(
            f"      {name}: {model.num_parameters():,} parameters, {result.tokens:,} tokens, {result.seconds:.0f} s, "
            f"training loss {result.loss:.3f}"
        )

    # --- artefacts ----------------------------------------------------------------------------

    def quantize(self) -> None:
        from benchmarks.report.quantization import report_files
        from quant.checkpoint import save_quantized

        files = partial(report_files, plan=None)
        for name in (TUNED, DMPT):
            for scheme in self.settings.schemes:
                out = self.out / "quantized" / f"{name}-{scheme}"
                if out.exists():
                    continue
                reports = save_quantized(self.checkpoint(name), out, scheme, files=files)
                before, after = (sum(getattr(r, f) for r in reports) for f in ("bytes_before", "bytes_after"))
                say(f"      {out.name}: {before / 1e6:.1f} -> {after / 1e6:.1f} MB")

    def variants(self) -> Iterator[tuple[str, str, Path]]:
        """(checkpoint name, scheme, folder to export) of every row of the table, in order."""
        yield BASE, "fp32", self.checkpoint(BASE)
        for name in (TUNED, DMPT):
            yield name, "fp32", self.checkpoint(name)
            for scheme in self.settings.schemes:
                yield name, scheme, self.out / "quantized" / f"{name}-{scheme}"

    def export(self) -> None:
        from dmpt_export.cli.onnx import report
        from dmpt_export.onnx.export import export_onnx

        for name, scheme, source in self.variants():
            if self.exported(name, scheme).exists():
                continue
            manifest = export_onnx(source, self.exported(name, scheme))
            say("      " + report(manifest, f"{name}-{scheme}").replace("\n", "\n        "))

    def exported(self, name: str, scheme: str) -> Path:
        return self.out / "onnx" / f"{name}-{scheme}"

    # --- results ------------------------------------------------------------------------------

    def generate(self, held_out: str) -> None:
        """Continue the start of a held-out paragraph, streamed to stdout."""
        import runtime

        s, prompt = self.settings, opening(held_out)
        with runtime.load(self.exported(DMPT, s.schemes[0])) as model:
            click.echo(prompt, nl=False)
            model.generate(
                prompt, max_new_tokens=s.new_tokens, temperature=s.temperature, top_k=s.top_k, seed=self.seed,
                on_token=lambda _, piece: click.echo(piece, nl=False),
            )  # fmt: skip
            click.echo("\n")

    def compare(self, texts: Texts) -> Comparison:
        from benchmarks.comparison.comparison import compare
        from benchmarks.comparison.contestants import Entry, Settings
        from benchmarks.comparison.doubts import noise
        from benchmarks.comparison.output import write as write_comparison

        s = self.settings
        entries = [
            Entry(
                f"{LABELS[name]} {scheme}",
                str(self.exported(name, scheme)),
                LABELS[name],
                scheme,
                control=name == TUNED,
            )
            for name, scheme, _ in self.variants()
        ]
        settings = Settings(prompt=s.prompt, gen=s.gen, repetitions=s.repetitions)
        result = compare(entries, [texts.held_out], settings=settings, seeds={"demo": self.seed})
        publish(partial(write_comparison, result), self.out)
        click.echo("\n".join([f"{result.table()}\n", result.reading, *noise(result.rows), result.conditions()]))
        return result


def say(text: str) -> None:
    """Print progress to stderr; stdout has the generated text and the table."""
    click.echo(text, err=True)


def opening(text: str) -> str:
    """The first words of the first line that looks like a sentence."""
    lines = [line for line in text.split("\n") if len(line.split()) >= 12 and line[0].isupper()]
    return " ".join((lines or text.split("\n"))[0].split()[:5])

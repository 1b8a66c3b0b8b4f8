"""What a person sees of a pretraining: preflight, the final table, marked sentences, and whether it learned."""

import math
import time

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from electrax.data import prepare as preparing
from electrax.data.tokenizer import Tokenizer
from electrax.experiment.config import PretrainConfig
from electrax.experiment.pretrain import evaluate_newest, plan, set_up
from electrax.experiment.run import Run
from electrax.models.flops import paper_step
from electrax.report.common import (
    INTERRUPTED,
    alone,
    console,
    show_line,
    show_machine,
    show_plan,
    show_steps,
    train_and_track,
    write_results,
)
from electrax.tasks.pretrain import PretrainTask
from electrax.training.loop import Record


class PrepareProgress:
    """Shows how far `prepare` is: a bar on a terminal, otherwise a line every ten seconds."""

    def __enter__(self) -> "PrepareProgress":
        self._bar = Progress(
            TextColumn("[bold]preparing"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:3.0f}%  {task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task, self._shown = self._bar.add_task("", total=1.0, figures=""), time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def __call__(self, now: preparing.Progress) -> None:
        if now.stage == "tokenizer":
            figures = "tokenizer"
        else:
            speed = now.text_mb / max(now.seconds, 1e-9)
            figures = f"{now.text_mb:.1f} MB at {speed:.2f} MB/s, {now.tokens:,} tokens, {now.rows:,} rows"
        self._bar.update(self._task, completed=now.share, figures=figures)
        if not console.is_terminal and (now.stage == "tokenizer" or time.monotonic() - self._shown > 10):
            self._shown = time.monotonic()
            console.print(f"preparing: {figures}", highlight=False, soft_wrap=True)


def show_prepared(out: str, report: preparing.Report) -> None:
    manifest = report.manifest
    table = Table(title=f"prepared {out}", title_justify="left")
    for name in ("split", "documents", "rows", "tokens"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name, split in manifest.splits.items():
        table.add_row(name, f"{split.documents:,}", f"{split.rows:,}", f"{split.tokens:,}")
    console.print(table)
    counts = manifest.counts
    speed = report.text_mb / max(report.seconds, 1e-9)
    console.print(
        f"{report.text_mb:.1f} MB in {report.seconds:.1f} s ({speed:.2f} MB/s); vocabulary {manifest.vocab_size:,}; "
        f"padding {counts['padding_share']:.2%}, unknown tokens {counts['unknown_share']:.3%}",
        highlight=False,
    )
    skipped = {kind: number for kind, number in counts.get("skipped", {}).items() if number}
    if skipped:
        console.print("skipped: " + ", ".join(f"{number} x {kind}" for kind, number in skipped.items()))


def show_preflight(run: Run) -> None:
    """Devices, parameters, tokens and FLOPs of a step, and the loss to expect at first."""
    show_machine(run)
    show_line("data", _describe_data(run))
    show_steps(run, f"{run.config.batch_size} rows x {run.config.data.max_length} = {run.tokens_per_step:,.0f}")
    task = run.task
    knows = not task.electric and task.generator_kind in ("masked", "shared") and task.discriminator.body == "electra"
    if knows:
        discriminator = task.discriminator if task.detects else None
        count = paper_step(task.generator, discriminator, run.config.batch_size, run.config.data.max_length)
        show_line("as the paper", f"counts FLOPs: {count:.3g} a step, {count * run.steps:.3g} the run")
    if run.start == 0 and not run.config.init_from:
        show_line("first loss", expected_first_loss(run))


def _describe_data(run: Run) -> str:
    splits = {name: f"{run.task.corpus.size(name):,} {name}" for name in ("train", "valid")}
    return f"{' and '.join(splits.values())} rows, {run.config.data.layout}, vocabulary {run.tokenizer.vocab_size:,}"


def expected_first_loss(run: Run) -> str:
    objective, vocabulary = run.config.objective, run.tokenizer.vocab_size
    value = objective.generator_weight * math.log(vocabulary)
    formula = f"{objective.generator_weight:g} x ln {vocabulary:,}"
    if run.task.electric:  # its logit starts at the log-odds of "chosen" against the generator's even guess
        p = objective.mask_prob
        shift = math.log(p / (1 - p)) - math.log(vocabulary)
        binary = p * math.log1p(math.exp(-shift)) + (1 - p) * math.log1p(math.exp(shift))
        value += objective.discriminator_weight * binary
        formula += f" + {objective.discriminator_weight:g} x {binary:.2f}"
    elif run.task.detects:
        value += objective.discriminator_weight * math.log(2)
        formula += f" + {objective.discriminator_weight:g} x ln 2"
    return f"about {value:.1f} = {formula}"


def pretrain_and_report(config: PretrainConfig, command: str) -> int:
    """The command `pretrain`: sets up, trains, reports. Returns the exit status."""
    if config.dry_run:
        show_plan(plan(config))
        return 0
    with alone(config.workdir):
        run = set_up(config, PrepareProgress(), early=True)
        show_preflight(run)
        final = train_and_track(run, command)
        if final is None:
            return INTERRUPTED
        write_results(run.config.workdir, {"step": final.step, **final.figures})
    show_final(run.task, run.tokenizer, final)
    return 0


def evaluate_and_report(config: PretrainConfig) -> int:
    """The command `evaluate`: the newest checkpoint's figures on the held-out rows; nothing is written."""
    task, tokenizer, final = evaluate_newest(config)
    show_final(task, tokenizer, final)
    return 0


MEANINGS = {
    "loss": "total, as trained",
    "mlm_loss": "generator: cross entropy at the predicted positions",
    "unigram_loss": "  the same by token frequency alone",
    "mlm_accuracy": "generator: right at the predicted positions, the visible ones too",
    "masked_accuracy": "generator: right where it did not see the chosen token",
    "unigram_accuracy": "  the same by always guessing the most frequent token",
    "sampled_accuracy": "generator: samples that are the original token",
    "replaced_share": "tokens that differ after sampling",
    "rtd_loss": "discriminator: binary cross entropy over all tokens",
    "rtd_accuracy": "discriminator: tokens judged rightly",
    "rtd_precision": "discriminator: of the flagged tokens, replaced",
    "rtd_recall": "discriminator: of the replaced tokens, flagged",
    "rtd_auc": "discriminator: area under the ROC curve (chance 0.5)",
}


def show_final(task: PretrainTask, tokenizer: Tokenizer, final: Record) -> None:
    """The evaluation as a table, held-out text with its replaced tokens marked, and what did not learn."""
    table = Table(title=f"held-out rows after step {final.step:,}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("meaning")
    for name, meaning in MEANINGS.items():
        if name in final.figures:
            table.add_row(name, f"{final.figures[name]:.4f}", meaning)
    console.print(table)
    if task.detects:
        console.print("[bold]replaced tokens[/]: was→now and the discriminator's probability that it was replaced;")
        console.print("green: found (above 50 %), red: missed, yellow: original but flagged")
        for line in marked_rows(tokenizer, final.arrays):
            console.print(line)
    for finding in task.diagnose(final.figures):
        console.print(f"[bold red]did not learn:[/] {finding}", soft_wrap=True)


def marked_rows(tokenizer: Tokenizer, arrays: dict[str, np.ndarray], count: int = 3, tokens: int = 40) -> list[Text]:
    """The start of a few held-out rows, spread evenly, with every replaced or flagged token marked."""
    lines = []
    for row in np.linspace(0, len(arrays["ids"]) - 1, min(count, len(arrays["ids"]))).astype(int):
        line = Text("- ")
        shown = np.flatnonzero(arrays["real"][row])[:tokens]
        original = tokenizer.pieces(arrays["ids"][row, shown])
        corrupted = tokenizer.pieces(arrays["corrupted"][row, shown])
        for place, was, now in zip(shown, original, corrupted, strict=True):
            probability = 1 / (1 + math.exp(-float(arrays["score"][row, place])))
            if arrays["replaced"][row, place]:
                line.append(f"[{was}→{now} {probability:.0%}]", "bold green" if probability > 0.5 else "bold red")
            elif probability > 0.5:
                line.append(f"[{now} {probability:.0%}]", "yellow")
            else:
                line.append(now)
            line.append(" ")
        lines.append(line)
    return lines

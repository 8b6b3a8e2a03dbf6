"""``jaxmoe train``: a language model on the user's text or conversations, with a progress bar."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import rich.console
import rich.progress
import tyro
from jax.sharding import Mesh

from jaxmoe.cli._models import find_config
from jaxmoe.config import ModelConfig
from jaxmoe.params import active_param_count, param_count
from jaxmoe.report import make_report, write_report
from jaxmoe.tokenizer import FileTokenizer
from jaxmoe.train import Progress, Summary, TrainConfig
from jaxmoe.train import train as run_training
from jaxmoe.train.data import DataOptions, gzip_bits_per_byte, make_tokenizer
from jaxmoe.train.devices import DeviceOptions
from jaxmoe.train.elastic import ElasticOptions, train_elastic
from jaxmoe.train.plot import plot_run
from jaxmoe.train.step import abstract_state


@contextlib.contextmanager
def training_progress(
    console: rich.console.Console, steps: int
) -> Iterator[Callable[[Progress], None]]:
    """A progress bar with loss, tokens/s and ETA; yields the callback for ``train``."""
    columns = (
        rich.progress.TextColumn("training"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[figures]}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps, figures="compiling ...")

        def update(p: Progress) -> None:
            figures = f"loss {p.loss:.3f} nats  {p.tokens_per_s:,.0f} tokens/s"
            bar.update(task, completed=p.step, figures=figures)
            if p.skipped:
                bar.console.print(
                    f"step {p.step} skipped: its loss, gradient or update is not finite"
                )
            if p.bits_per_byte is not None:
                bar.console.print(f"step {p.step}: {p.bits_per_byte:.3f} bits per held-out byte")

        yield update


def report_rows(summary: Summary, train_config: TrainConfig) -> tuple[list[dict], dict[str, float]]:
    """Rows and ratios of a training report: held-out bits per byte, of text beside gzip's on the same bytes."""
    rows = [
        {
            "name": f"held-out, {train_config.held_out_attention} attention",
            "value": summary.bits_per_byte,
            "unit": "bits/byte",
            "step": summary.step,
        },
        {
            "name": "held-out, per token",
            "value": summary.held_out_loss,
            "unit": "nats",
            "step": summary.step,
        },
        {"name": "training time", "value": summary.seconds, "unit": "s"},
    ]
    if summary.corpus.is_chat:  # where only what the assistant says is scored
        return rows, {}
    baseline = gzip_bits_per_byte(summary.corpus, train_config.eval_bytes)
    rows.append({"name": "gzip -9, same bytes", "value": baseline, "unit": "bits/byte"})
    return rows, {"model_over_gzip": summary.bits_per_byte / baseline}


def fit_vocabulary(
    config: ModelConfig, data: DataOptions, vocab_size: int | None = None
) -> ModelConfig:
    """The model with another vocabulary, if asked for, and with the end-of-document token of a tokenizer file."""
    if vocab_size is not None:
        config = config.replace(vocab_size=vocab_size)
    tokenizer = make_tokenizer(data.tokenizer)
    if isinstance(tokenizer, FileTokenizer):
        config = config.replace(eos_token_id=tokenizer.eos)
    return config


def check_memory(
    config: ModelConfig,
    train_config: TrainConfig,
    state: Any = None,
    hint: str = "Choose a smaller --model, such as tiny or small.",
) -> None:
    """Raises ValueError if not even the state of training fits into this machine, before the system kills the process.

    Args:
      config: the model.
      train_config: the run.
      state: its arrays' shapes; default: parameters and moments.
      hint: the way out.
    """
    if jax.default_backend() != "cpu" or not hasattr(os, "sysconf"):
        return
    state = abstract_state(config, train_config) if state is None else state
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"stage {train_config.stage} of {param_count(config, include_mtp=True):,} parameters needs at least {needed / 2**30:.0f} GiB; this "
            f"machine has {memory / 2**30:.0f}. {hint}"
        )


def run_and_report(
    config: ModelConfig,
    train_config: TrainConfig,
    output: pathlib.Path,
    data: DataOptions,
    console: rich.console.Console,
    elastic: ElasticOptions | None = None,
    init_from: pathlib.Path | None = None,
    mesh: Mesh | None = None,
) -> tuple[Summary, list[dict], dict[str, float]]:
    """Trains with a progress bar, prints the outcome, draws the plot; with ``elastic`` on ranks that may die."""
    check_memory(config, train_config)
    console.print(
        f"{param_count(config, include_mtp=True):,} parameters, {active_param_count(config):,} active per token; "
        f"{train_config.steps} steps of {train_config.batch_size} x {train_config.seq_len} {'bytes' if data.tokenizer is None else 'tokens'}"
    )
    with training_progress(console, train_config.steps) as update:
        if elastic is None:
            summary = run_training(
                config,
                train_config,
                output,
                data=data,
                on_progress=update,
                init_from=init_from,
                mesh=mesh,
            )
        else:
            summary = train_elastic(
                config,
                train_config,
                output,
                data=data,
                options=elastic,
                on_progress=update,
                on_event=lambda event: console.print(str(event)),
            )
    rows, ratios = report_rows(summary, train_config)
    console.print(f"corpus: {summary.corpus}")
    held_out = f"held out: [bold]{summary.bits_per_byte:.3f}[/] bits per byte"
    if data.tokenizer is not None or summary.corpus.is_chat:
        held_out += f", {summary.held_out_loss:.3f} nats per token"
    if ratios:
        held_out += f"; gzip -9 on the same bytes: {rows[-1]['value']:.3f}"
    console.print(held_out)
    if jax.process_index() == 0:
        console.print(f"plot: {plot_run(output)}")
    return summary, rows, ratios


def train(
    model: str | None = None,
    output: pathlib.Path = pathlib.Path("runs/train"),
    init_from: pathlib.Path | None = None,
    index_topk: int | None = None,
    source: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions(),
    vocab_size: int | None = None,
    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),
    devices: Annotated[DeviceOptions, tyro.conf.arg(name="")] = DeviceOptions(),
    elastic: bool = False,
    ranks: Annotated[ElasticOptions, tyro.conf.arg(name="")] = ElasticOptions(),
    json: pathlib.Path | None = None,
) -> None:
    """Trains a language model and goes on where an interrupted run stopped.

    With --elastic on processes of their own that may die: training goes on without them, and with them again.

    Args:
      model: Preset, or a checkpoint whose architecture to use; default: that of --init-from, or tiny.
      output: Directory of the run: checkpoints, metrics.jsonl, training.png.
      init_from: Run or checkpoint with whose parameters to start: the stage before.
      index_topk: Keys that each query selects, if it shall be others than the preset's or checkpoint's.
      source: What to train on.
      vocab_size: Tokens that the model knows, if it shall be others than the preset's or checkpoint's.
      options: Hyper-parameters.
      devices: Where to train; every process of several is started with the same command and its own --process-id.
      elastic: Train on --ranks processes, any of which may die.
      ranks: Of an elastic run.
      json: Also write a JSON report.
    """
    console = rich.console.Console(soft_wrap=True, highlight=False)
    if not elastic and ranks != ElasticOptions():
        given = {f.name for f in dataclasses.fields(ranks) if getattr(ranks, f.name) != f.default}
        named = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise ValueError(
            f"{named} can only be given to an elastic run; add --elastic, or leave it out."
        )
    if elastic and devices != DeviceOptions():
        raise ValueError(
            "an elastic run makes its own mesh of --ranks; leave --*-parallel and --coordinator-address out."
        )
    if elastic and init_from is not None:
        raise ValueError(
            f"--init-from {init_from} cannot be given to an elastic run; leave one out."
        )
    with devices.connected():
        console.quiet = jax.process_index() > 0
        config = fit_vocabulary(find_config(model or str(init_from or "tiny")), source, vocab_size)
        if index_topk is not None:
            config = config.replace(index_topk=index_topk)
        chosen, mesh = (ranks, None) if elastic else (None, devices.mesh())
        _, rows, ratios = run_and_report(
            config, options, output, source, console, chosen, init_from, mesh
        )
        console.print(f"generate with: jaxmoe generate {output}")
        if json is not None and jax.process_index() == 0:
            report = make_report("train", rows, ratios)
            given = dataclasses.asdict(options) | (dataclasses.asdict(ranks) if elastic else {})
            write_report(json, report | {"options": given})

"""``jaxmoe tune``: one model for every SEFP width, beside the methods that it is compared with."""

import dataclasses
import pathlib
from typing import Annotated, Any

import rich.box
import rich.console
import rich.progress
import rich.table
import tyro

from jaxmoe import checkpoint
from jaxmoe.cli._models import find_config, locate
from jaxmoe.cli.train import check_memory
from jaxmoe.params import abstract_params
from jaxmoe.report import make_report, write_report
from jaxmoe.train import TrainConfig
from jaxmoe.train.data import DataOptions, load_corpus
from jaxmoe.train.tune import (
    SearchOptions,
    Widths,
    abstract_state,
    baselines,
    check,
    otaro_config,
    score_source,
)
from jaxmoe.train.tune import tune as run_tuning
from jaxmoe.train.widths import compare, decode_speeds, plot_widths
from quant import Lora, bps

_DEFAULTS = TrainConfig(steps=200, learning_rate=3e-4, warmup_steps=20, eval_bytes=131072)


def _table(results: list[Widths], speeds: dict[int, float]) -> rich.table.Table:
    # As narrow as a terminal of 80 columns.
    table = rich.table.Table(
        title="held-out nats per token",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("method", *(f"E5M{w}" for w in bps.WIDTHS), "mean", "float"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for r in results:
        figures = (*r.losses.values(), r.mean, r.unquantised)
        table.add_row(r.method, *(f"{value:.4f}" for value in figures))
    sizes = results[0].bytes.values()
    table.add_row("MB", *(f"{size / 1e6:.3g}" for size in sizes), "", "", style="dim")
    if speeds:
        figures = (*(f"{speeds[w]:.4g}" for w in bps.WIDTHS), "", f"{speeds[0]:.4g}")
        table.add_row("tokens/s", *figures, style="dim")
    return table


def report_rows(
    results: list[Widths], speeds: dict[int, float]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios of a tuning report: a row per method and width, and of ``decode_speeds``; how otaro's mean and ends compare with
    the others'."""
    rows = [
        {
            "name": f"{r.method}, E5M{width}",
            "value": loss,
            "unit": "nats/token",
            "method": r.method,
            "width": width,
            "bits_per_byte": r.bits_per_byte[width],
            "bytes": r.bytes[width],
            "steps": r.visits.get(width, 0),
        }
        for r in results
        for width, loss in r.losses.items()
    ]
    rows += [
        {"name": f"{r.method}, unquantised", "value": r.unquantised, "unit": "nats/token"}
        for r in results
    ]
    for r in results:
        if r.directory is not None:
            rows.append({"name": f"{r.method}, tuning", "value": r.seconds, "unit": "s"})
            rows.append({"name": f"{r.method}, tuned", "value": r.tuned, "unit": "parameters"})
    rows += [
        {"name": f"{f'E5M{w}' if w else 'unquantised'}, decode", "value": speed, "unit": "tokens/s"}
        for w, speed in speeds.items()
    ]
    sizes = results[0].bytes
    ratios = {"bytes_m3_over_m8": sizes[3] / sizes[8]} | compare(results)
    return rows, ratios


def lora_of(rank: int | None, alpha: float | None) -> Lora | None:
    """What --lora-rank and --lora-alpha ask for; None for tuning of all weights.

    Raises:
      ValueError: for an alpha without a rank, or one that ``Lora`` refuses.
    """
    if rank is None:
        if alpha is not None:
            raise ValueError(
                f"lora_alpha needs lora_rank; got {alpha} alone. Give --lora-rank, too."
            )
        return None
    return Lora(rank) if alpha is None else Lora(rank, alpha)


def tune(
    source: Annotated[str, tyro.conf.Positional],
    method: tuple[str, ...] = ("otaro",),
    output: pathlib.Path = pathlib.Path("runs/tune"),
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions(),
    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = _DEFAULTS,
    search: Annotated[SearchOptions, tyro.conf.arg(name="")] = SearchOptions(),
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    decode_tokens: int = 32,
    json: pathlib.Path | None = None,
) -> None:
    """Tunes a trained model for every SEFP width, by each of the methods for the same steps on the same batches, and compares them.

    Goes on where an interrupted run stopped. Steps are small by default; --learning-rate should be a tenth of training's.

    Args:
      source: Run or checkpoint to start from.
      method: otaro (bit-width path search and accumulation), uniform or round_robin (widths at random or in turn), joint (all widths
        in each step), fixed:W (one width, 3 to 8; fixed:8 is tuning at the highest and truncating), ptq (no quantisation in
        training, rounding to nearest after: a file per width). "+nested" after a name rounds, in training and after it, to the code
        that serves all widths best instead of cutting off. Several are compared.
      output: Gets a directory per method, with checkpoints and metrics.jsonl, and widths.png.
      data: What to train on.
      options: Hyper-parameters.
      search: Of method otaro.
      lora_rank: Tune low-rank additions to every matrix (LoRA) instead of all weights: their inner size. Less memory for moments; the learning
        rate is usually some ten times higher.
      lora_alpha: The additions' scale is this over lora_rank; default 16.
      decode_tokens: How many tokens are timed at each width at the end; 0: none.
      json: Also write a JSON report.
    """
    console = rich.console.Console(soft_wrap=True, highlight=False)
    if not method or len(set(method)) < len(method):
        raise ValueError(
            f"method must name at least one, and each once; got {' '.join(method) or 'none'}."
        )
    # Before anything is read or trained.
    if decode_tokens < 0:
        raise ValueError(
            f"decode_tokens must be at least 0; got {decode_tokens}. Use 0 to leave the speeds out."
        )
    runs = [otaro_config(name, options.steps, search) for name in method]
    lora = lora_of(lora_rank, lora_alpha)
    check(options)
    config = find_config(str(locate(source)))
    # With adapters the weights that stay, and those that both make.
    beside = () if lora is None else (abstract_params(config),) * 2
    hint = f"{'Add' if lora is None else 'Choose a smaller'} --lora-rank, or a smaller source."
    for run in runs:  # of which some collect gradients beside the moments
        check_memory(config, options, (abstract_state(config, options, run, lora), beside), hint)
    corpus = load_corpus(data)
    results = [score_source(source, config, options, corpus, r) for r in baselines(method)]
    for name in method:
        with rich.progress.Progress(console=console) as bar:
            task = bar.add_task(name, total=options.steps)

            def update(record: dict[str, Any], task=task, bar=bar) -> None:
                bar.update(task, completed=record["step"])

            directory = output / name.replace(":", "_")
            results.append(
                run_tuning(
                    source,
                    name,
                    config,
                    options,
                    corpus,
                    directory,
                    search=search,
                    lora=lora,
                    on_step=update,
                )
            )
        visits = ", ".join(f"{w or 'all'}: {n}" for w, n in results[-1].visits.items())
        console.print(
            f"{name}: {results[-1].seconds:.0f} s; {results[-1].tuned:,} parameters tuned; steps at each width: {visits}"
        )
    speeds = {}
    if decode_tokens:
        speeds = decode_speeds(checkpoint.load(directory)[0], config, tokens=decode_tokens)
    console.print(_table(results, speeds))
    console.print(f"plot: {plot_widths(results, output / 'widths.png', speeds)}")
    console.print(f"generate with: jaxmoe generate {directory} --width 3")
    if json is not None:
        report = make_report("tune", *report_rows(results, speeds))
        given = dataclasses.asdict(options) | dataclasses.asdict(search)
        given |= {"lora_rank": lora and lora.rank, "lora_alpha": lora and lora.alpha}
        write_report(json, report | {"options": given})

"""One tuning for every precision beside the other ways to the same widths: mean and deviation over seeds.

    python -m bench.otaro --output runs/otaro --json bench/results/otaro.json

A byte model of 3.1 M parameters is pre-trained on Python's standard library, once per seed. From there each method tunes for the same
steps on the same batches (``jaxmoe tune``), and is scored on held-out text at every width. Two peers are not one model for all widths:
"fixed:3" is the model tuned for E5M3 alone, "ptq" has no quantisation in training and is rounded to nearest per width. "+nested" rounds
to the code that serves all widths. A run that is there already is gone on with. Options of method otaro were chosen on seed 100
(``--seeds 100 --name VARIANT``), the figures are of the others.
"""

import argparse
import dataclasses
import pathlib
import statistics
from typing import Any

import jaxmoe
from bench import _harness
from jaxmoe.presets import presets
from jaxmoe.report import make_report, write_report
from jaxmoe.train import TrainConfig, train
from jaxmoe.train.data import Corpus, DataOptions, load_corpus
from jaxmoe.train.tune import (
    SearchOptions,
    Widths,
    baselines,
    score_source,
    tune,
)
from jaxmoe.train.widths import compare, plot_widths
from quant import Lora

PLAIN = ("otaro", "uniform", "joint", "fixed:3", "fixed:8", "ptq")
METHODS = (*PLAIN, "otaro+nested", "uniform+nested", "ptq+nested")
SEARCH = dataclasses.fields(SearchOptions)

# 3.1 M parameters, attention over all keys: what is asked is about weights.
MODEL = presets["tiny"].replace(
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=5,
    first_k_dense_replace=5,
    num_nextn_predict_layers=0,
    index_topk=None,
    index_n_heads=None,
    index_head_dim=None,
)


def pretrained(directory: pathlib.Path, steps: int, seed: int) -> pathlib.Path:
    """The run that all methods of a seed start from."""
    options = TrainConfig(
        steps=steps, batch_size=16, seq_len=128, seed=seed, eval_every=10**6, save_every=steps
    )
    train(MODEL, options, directory)
    return directory


def mean_of(results: list[Widths]) -> Widths:
    """A method's mean over seeds."""
    losses = {w: statistics.mean(r.losses[w] for r in results) for w in results[0].losses}
    plain = statistics.mean(r.unquantised for r in results)
    return dataclasses.replace(results[0], losses=losses, unquantised=plain)


def rows_of(results: list[Widths]) -> list[dict[str, Any]]:
    """Mean and deviation over seeds of a method at each width, over all widths, and without quantisation."""
    figures = {f"E5M{w}": [r.losses[w] for r in results] for w in results[0].losses}
    figures |= {
        "mean of widths": [r.mean for r in results],
        "unquantised": [r.unquantised for r in results],
    }
    return [
        {
            "name": f"{results[0].method}, {what}",
            "value": statistics.mean(values),
            "unit": "nats/token",
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "each": values,
        }
        for what, values in figures.items()
    ]


def run_seed(args: argparse.Namespace, seed: int, corpus: Corpus) -> list[Widths]:
    """Every method from the same pre-trained model."""
    search = SearchOptions(**{f.name: getattr(args, f.name) for f in SEARCH})
    search = dataclasses.replace(search, low_widths=tuple(search.low_widths))
    home = args.output / f"seed_{seed}"
    source = pretrained(home / "pretrain", args.pretrain_steps, seed)
    c = TrainConfig(
        steps=args.steps,
        batch_size=8,
        seq_len=128,
        learning_rate=args.learning_rate,
        warmup_steps=10,
        eval_bytes=args.eval_bytes,
        seed=seed,
    )
    results = [score_source(source, MODEL, c, corpus, r) for r in baselines(args.methods)]
    for method in args.methods:
        name = method.replace(":", "_") + (args.name if method.startswith("otaro") else "")
        lora = None if args.lora_rank is None else Lora(args.lora_rank)
        name += "" if lora is None else f"_lora_{lora.rank}"
        results.append(
            tune(source, method, MODEL, c, corpus, home / name, search=search, lora=lora)
        )
    return results


def main() -> None:
    """Runs the comparison."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--methods", nargs="+", default=METHODS)
    options.add_argument("--pretrain-steps", type=int, default=600)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--eval-bytes", type=int, default=32768)
    options.add_argument("--lora-rank", type=int, help="tune low-rank additions")
    for field in SEARCH:
        name, default = "--" + field.name.replace("_", "-"), field.default
        if field.name == "low_widths":
            options.add_argument(name, type=int, nargs="*", default=default)
        else:
            options.add_argument(name, type=type(default), default=default)
    options.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/otaro"))
    options.add_argument("--name", default="", help="added to the directories of otaro's runs")
    options.add_argument("--plot", type=pathlib.Path, help="draw the first seed's results here")
    args = options.parse_args()
    corpus = load_corpus(DataOptions())
    found: dict[str, list[Widths]] = {}
    for seed in args.seeds:
        results = run_seed(args, seed, corpus)
        for result in results:
            found.setdefault(result.method, []).append(result)
            losses = " ".join(f"{loss:.4f}" for loss in result.losses.values())
            print(f"seed {seed} {result.method:18} {losses}  mean {result.mean:.4f}", flush=True)
        if args.plot and seed == args.seeds[0]:
            plot_widths(results, args.plot)
    rows = [row for results in found.values() for row in rows_of(results)]
    ratios = compare([mean_of(results) for results in found.values()])
    for name, value in ratios.items():
        print(f"{name}: {value:.4f}")
    if args.json:
        kept = {k: v for k, v in vars(args).items() if k not in ("output", "json", "plot", "name")}
        shape = {"parameters": jaxmoe.param_count(MODEL)}
        report = make_report("otaro", rows, ratios)
        write_report(args.json, report | {"options": kept | shape})


if __name__ == "__main__":
    main()

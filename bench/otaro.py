"""One tuning for every precision beside the other ways to the same widths: mean and deviation over seeds.

    python -m bench.otaro --output runs/otaro --json bench/results/otaro.json

A byte model of 3.1 M parameters is pre-trained on Python's standard library, once per seed. From there each method tunes for the same
steps on the same batches (``jaxmoe tune``), and is scored on held-out text at every width. Two peers are not one model for all widths:
"fixed:3" is the model tuned for E5M3 alone, "ptq" has no quantisation in training and is rounded to nearest per width. A run that is
there already is gone on with. Options of method otaro were chosen on seed 100 (``--seeds 100``), the figures are of the others.
"""

import dataclasses
import pathlib
import statistics
from typing import Any

import jaxmoe
from bench import _harness
from jaxmoe.presets import presets
from jaxmoe.report import make_report, write_report
from jaxmoe.train import TrainConfig, train
from jaxmoe.train.data import DataOptions, load_corpus
from jaxmoe.train.tune import SearchOptions, Widths, plot_widths, score_source, tune

METHODS = ("otaro", "uniform", "round_robin", "joint", "fixed:3", "fixed:8", "ptq")
ONE_MODEL = ("otaro", "uniform", "round_robin", "joint", "fixed:3", "fixed:8")  # truncated

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


def summary(found: dict[str, list[Widths]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of mean and deviation over seeds per method and width; ratios of means."""
    rows = []

    def row(method: str, what: str, values: list[float]) -> float:
        mean = statistics.mean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        name = f"{method}, {what}"
        rows.append(
            {
                "name": name,
                "value": mean,
                "unit": "nats/token",
                "deviation": deviation,
                "each": values,
            }
        )
        return mean

    means, at, plain = {}, {}, {}
    for method, results in found.items():
        for width in results[0].losses:
            at[method, width] = row(method, f"E5M{width}", [r.losses[width] for r in results])
        means[method] = row(method, "mean of widths", [r.mean for r in results])
        plain[method] = row(method, "unquantised", [r.unquantised for r in results])
    ratios = {
        f"mean_otaro_over_{method}": means["otaro"] / means[method]
        for method in means
        if method != "otaro"
    }
    if ("fixed:3", 3) in at:
        ratios["m3_otaro_over_fixed:3"] = at["otaro", 3] / at["fixed:3", 3]
    if "ptq" in plain:
        ratios["m8_otaro_over_unquantised_tuning"] = at["otaro", 8] / plain["ptq"]
    return rows, ratios


def main() -> None:
    """Runs the comparison."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--methods", nargs="+", default=METHODS)
    options.add_argument("--pretrain-steps", type=int, default=600)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--eval-bytes", type=int, default=65536)
    for field in dataclasses.fields(SearchOptions):
        name, default = "--" + field.name.replace("_", "-"), field.default
        if field.name == "low_widths":
            options.add_argument(name, type=int, nargs="*", default=default)
        else:
            options.add_argument(name, type=type(default), default=default)
    options.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/otaro"))
    options.add_argument(
        "--name", default="", help="added to the directories of method otaro's runs"
    )
    options.add_argument(
        "--plot", type=pathlib.Path, help="also draw the first seed's results here"
    )
    args = options.parse_args()
    given = vars(args)
    search = SearchOptions(**{f.name: given[f.name] for f in dataclasses.fields(SearchOptions)})
    search = dataclasses.replace(search, low_widths=tuple(search.low_widths))
    corpus = load_corpus(DataOptions())
    found: dict[str, list[Widths]] = {}
    for seed in args.seeds:
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
        results = [score_source(source, MODEL, c, corpus)]
        for method in args.methods:
            name = method.replace(":", "_") + (args.name if method.startswith("otaro") else "")
            results.append(tune(source, method, MODEL, c, corpus, home / name, search=search))
        for result in results:
            found.setdefault(result.method, []).append(result)
            losses = " ".join(f"{loss:.4f}" for loss in result.losses.values())
            print(f"seed {seed} {result.method:12} {losses}  mean {result.mean:.4f}", flush=True)
        if args.plot and seed == args.seeds[0]:
            plot_widths(results, args.plot)
    rows, ratios = summary(found)
    report = make_report("otaro", rows, ratios)
    shape = {"parameters": jaxmoe.param_count(MODEL), "one_model_methods": ONE_MODEL}
    kept = {k: v for k, v in given.items() if k not in ("output", "json", "plot", "name")}
    for name, value in ratios.items():
        print(f"{name}: {value:.4f}")
    if args.json:
        write_report(args.json, report | {"options": kept | shape})


if __name__ == "__main__":
    main()

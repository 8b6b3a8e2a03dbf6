"""Do large models taught by small ones reach what federated averaging of the large model reaches, and what do clients save?

    python -m bench.fed_quality --preset digits --json bench/results/fed_quality_digits.json
    python -m bench.fed_quality --preset mnist --data mnist.npz --json bench/results/fed_quality_mnist.json

Every method gets the same splits, seeds, rounds, local training, proxy inputs and number of distillation steps per round, and the learning
rate of its clients that ``learning_rates`` has for it, chosen with --learning-rate. Accuracy is on the test part at the last round; settings
were chosen by accuracy on the validation part, of seed 100 (digits: 100 to 102), which no reported run uses.
"""

import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import time

import numpy as np

import fed
from bench._harness import parser
from fed import report
from fed.compare import METHODS, run_method
from jaxmoe.report import make_report, write_report

ALPHAS = ("iid", "0.5", "0.1")
MAIN = ("fedavg-large", "koala-homo", "koala-hete", "feddf", "fedmd")


@dataclasses.dataclass(frozen=True)
class Preset:
    """One comparison: data, models, training.

    Attributes:
      local: of the clients, in every method.
      learning_rates: theirs by method, where another is better than that of ``local``.
    """

    data: str
    proxy: int | float
    validation: int | float
    clients: int
    rounds: int
    small: tuple[str, ...]
    large: str
    local: fed.LocalOptions
    koala: fed.KoalaOptions
    evaluate_every: int = 10
    learning_rates: tuple[tuple[str, float], ...] = ()

    def local_for(self, method: str) -> fed.LocalOptions:
        """Local training of a method's clients."""
        rate = dict(self.learning_rates).get(method, self.local.learning_rate)
        return dataclasses.replace(self.local, learning_rate=rate)


PRESETS = {
    "digits": Preset(
        "digits",
        400,
        150,
        20,
        50,
        ("mlp:96", "mlp:104", "mlp:88"),
        "mlp:512,512",
        fed.LocalOptions(epochs=5, batch_size=16, learning_rate=0.1),
        fed.KoalaOptions(
            reverse=fed.Distillation(steps=100),
            forward=fed.Distillation(steps=100, learning_rate=3e-3, features=0.1),
            merge=fed.Merge("uniform", space="logits"),
            members="clients",
            augment="mix",
            copies=4,
        ),
        learning_rates=(
            ("fedavg-large", 0.4),
            ("centralised", 0.4),
            ("koala-homo", 0.8),
            ("feddf", 0.4),
            ("koala-hete", 0.4),
        ),
    ),
    "mnist": Preset(
        "mnist",
        4000,
        1000,
        20,
        20,
        ("mlp:58", "mlp:62", "mlp:54"),
        "mlp:1024,1024",
        fed.LocalOptions(epochs=1, batch_size=32, learning_rate=0.4),
        fed.KoalaOptions(
            reverse=fed.Distillation(steps=100, batch_size=128),
            forward=fed.Distillation(steps=50, batch_size=128, features=0.1),
            merge=fed.Merge("uniform", space="logits"),
            members="clients",
            augment="mix",
            copies=4,
        ),
        evaluate_every=5,
    ),
}


def splits(preset: Preset, path: str | None, alpha: str, seed: int):
    """The split and partition that every method gets."""
    train, test = fed.data.load(preset.data, path)
    more = {"test": 300} if test is None else {"test": test}
    cut = fed.split(train, proxy=preset.proxy, validation=preset.validation, seed=seed, **more)
    if alpha == "iid":
        return cut, fed.partition.iid(cut.train.labels, preset.clients, seed)
    return cut, fed.partition.dirichlet(cut.train.labels, preset.clients, float(alpha), seed)


@functools.cache
def models(preset: Preset, path: str | None):
    """The server's model and the clients'; made once, so that programs are compiled once for all runs."""
    cut, _ = splits(preset, path, "iid", 0)
    large, *small = (
        fed.architectures.by_name(m, cut.train.shape, cut.train.classes)
        for m in (preset.large, *preset.small)
    )
    return large, small


def run_one(preset: Preset, path: str | None, method: str, alpha: str, seed: int) -> dict:
    """One method on one split, as a row."""
    cut, partition = splits(preset, path, alpha, seed)
    options = fed.RunOptions(
        rounds=preset.rounds,
        seed=seed,
        local=preset.local_for(method),
        evaluate_every=preset.evaluate_every,
        engine=fed.EngineOptions("auto"),  # clients' copies of the large model leave the cache
    )
    began = time.perf_counter()
    history = run_method(method, cut, partition, models(preset, path), options, preset.koala)
    figures = report.summary(history)
    large = figures.get("large_accuracy", figures["small_accuracy"])
    return {
        "name": f"{method}, {alpha}, seed {seed}",
        "value": large if method != "fedmd" else figures["small_accuracy"],
        "unit": "accuracy",
        "method": method,
        "alpha": alpha,
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "partition": history.partition,
        "validation": history.final.get("large_validation", history.final["small_validation"]),
        "curve": {
            m: [
                round(float(v), 4)
                for v in history.series(m)[preset.evaluate_every - 1 :: preset.evaluate_every]
            ]
            for m in ("large_accuracy", "small_accuracy")
            if m in history.final
        },
        **figures,
    }


@functools.cache
def savings(preset: Preset, path: str | None) -> dict[str, float]:
    """What the clients of each mode save against clients with the large model."""
    large, small = models(preset, path)
    found = {}
    for mode, chosen in (("homo", small[:1]), ("hete", small)):
        saved = report.pair_savings(large, chosen, preset.local)
        found |= {f"{mode} saved_{k}": v for k, v in saved.items()}
    return found


def ratios(rows: list[dict]) -> dict[str, float]:
    """Points of accuracy (mean over seeds) that each method is behind FedAvg of the large model."""
    found = {}
    for alpha in ALPHAS:
        means = {}
        for method in METHODS:
            values = [r["value"] for r in rows if (r["method"], r["alpha"]) == (method, alpha)]
            if values:
                means[method] = 100 * float(np.mean(values))
        anchor = means.pop("fedavg-large", None)
        if anchor is not None:
            found |= {
                f"points behind fedavg-large, {alpha}, {m}": anchor - v for m, v in means.items()
            }
    return found


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--preset", choices=list(PRESETS), default="digits")
    options.add_argument("--data", help="path of the data set's file, where it has one")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(MAIN))
    options.add_argument("--alphas", nargs="+", choices=ALPHAS, default=list(ALPHAS))
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--learning-rate", type=float, help="of all clients, to choose one")
    given = options.parse_args()
    logging.disable(logging.WARNING)
    preset = PRESETS[given.preset]
    if given.learning_rate is not None:
        local = dataclasses.replace(preset.local, learning_rate=given.learning_rate)
        preset = dataclasses.replace(preset, local=local, learning_rates=())
    settings = {"preset": given.preset} | {k: repr(v) for k, v in vars(preset).items()}
    rows: list[dict] = []
    if given.json and pathlib.Path(given.json).exists():  # goes on where it stopped, per run
        before = json.loads(pathlib.Path(given.json).read_text())
        if before["settings"] != settings:
            options.error(
                f"{given.json} has runs with other settings; remove it, or name another file"
            )
        rows = before["rows"]
    done = {r["name"] for r in rows}
    for seed, alpha, method in itertools.product(given.seeds, given.alphas, given.methods):
        if f"{method}, {alpha}, seed {seed}" in done:
            continue
        row = run_one(preset, given.data, method, alpha, seed)
        rows.append(row)
        own = f"small {row['small_accuracy']:.4f}, worst {row['own_worst']:.4f}"
        print(f"{row['name']:32} {row['value']:.4f}  {own}  {row['seconds']:.0f} s", flush=True)
        if given.json:
            saved = savings(preset, given.data)
            report_ = make_report("fed_quality", rows, ratios(rows) | saved)
            write_report(given.json, report_ | {"settings": settings})
    for name, value in (ratios(rows) | savings(preset, given.data)).items():
        print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()

"""``jaxmoe fed``: federated methods from the command line. The only place of jaxmoe that knows of the package above it, and only when called."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import rich.console
import rich.progress
import tyro

import fed
from fed import architectures, report
from fed.aggregate import by_name
from fed.compare import METHODS, hides_too_much, run_method
from fed.compress import codec_named
from jaxmoe.cli import fed_deploy, fed_text
from jaxmoe.report import make_report, write_report


@dataclasses.dataclass(frozen=True)
class FleetOptions:
    """Data, clients and models.

    Attributes:
      data: digits (comes with scikit-learn), or NAME:PATH with NAME one of mnist, fashion_mnist, cifar10, images (a folder per
        class), speakers (a play), texts (a folder).
      examples: of a larger source, use this many for training.
      clients: how many; with natural partitions at most.
      partition: iid, dirichlet, shards (classes_per_client), quantity, natural (by speaker or file).
      alpha: of dirichlet.
      classes_per_client: of shards.
      proxy: share of the data that the server holds without labels.
      small: architectures of the clients, in turn: mlp:16, cnn:8,16, vgg:16,32, mobilenet:8, vit:32x2, transformer:64x2.
      large: architecture of the server.
      length: tokens per example of texts.
    """

    data: str = "digits"
    examples: int | None = None
    clients: int = 20
    partition: Literal["iid", "dirichlet", "shards", "quantity", "natural"] = "dirichlet"
    alpha: float = 0.5
    classes_per_client: int = 2
    proxy: float = 0.2
    small: tuple[str, ...] = ("mlp:16",)
    large: str = "mlp:256,256"
    length: int = 64


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Rounds and clients' training.

    Attributes:
      rounds: of communication.
      seed: of everything.
      epochs: of a client per round.
      batch_size: of a client.
      optimizer: of a client.
      learning_rate: of a client.
      aggregator: mean, median, trimmed:SHARE, krum:MALICIOUS:KEEP, secure, private:CLIP:NOISE:EXPECTED.
      codec: of updates: none, bfloat16, int8, sefp:WIDTH, topk:FRACTION.
      poisoned: numbers of clients that send the negative of their update, tenfold.
      evaluate_every: rounds between evaluations.
    """

    rounds: int = 20
    seed: int = 0
    epochs: int = 2
    batch_size: int = 16
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    learning_rate: float = 0.1
    aggregator: str = "mean"
    codec: str = "none"
    poisoned: tuple[int, ...] = ()
    evaluate_every: int = 1


def _splits(fleet: FleetOptions, seed: int) -> tuple[fed.Splits, fed.Partition]:
    name, _, path = fleet.data.partition(":")
    train, test = fed.data.load(name, path or None, length=fleet.length)
    if fleet.examples is not None:
        if not 0 < fleet.examples <= len(train):
            raise ValueError(f"examples must lie in [1, {len(train)}]; got {fleet.examples}.")
        train = train.take(np.random.default_rng(seed).permutation(len(train))[: fleet.examples])
    cut = fed.split(train, proxy=fleet.proxy, seed=seed, **({} if test is None else {"test": test}))
    labels, rules = cut.train.labels, fed.partition
    makers: dict[str, Callable[[], fed.Partition]] = {
        "iid": lambda: rules.iid(len(labels), fleet.clients, seed),
        "dirichlet": lambda: rules.dirichlet(labels, fleet.clients, fleet.alpha, seed),
        "shards": lambda: rules.shards(labels, fleet.clients, fleet.classes_per_client, seed),
        "quantity": lambda: rules.quantity(len(labels), fleet.clients, seed),
        "natural": lambda: rules.natural(cut.train.owners, clients=fleet.clients),
    }
    if labels.ndim > 1 and fleet.partition in ("dirichlet", "shards"):
        raise ValueError(
            f"partition of texts must be natural, iid or quantity; got {fleet.partition}."
        )
    return cut, makers[fleet.partition]()


def _run_options(
    training: TrainingOptions, sampling: fed.Sampling, engine: fed.EngineOptions
) -> fed.RunOptions:
    attack = (fed.Attack(training.poisoned, "sign", 10.0),) if training.poisoned else ()
    codec = codec_named(training.codec)
    return fed.RunOptions(
        rounds=training.rounds,
        seed=training.seed,
        local=fed.LocalOptions(
            epochs=training.epochs,
            batch_size=training.batch_size,
            optimizer=training.optimizer,
            learning_rate=training.learning_rate,
        ),
        engine=engine,
        sampling=sampling,
        aggregator=by_name(training.aggregator),
        uploads=attack if codec.lossless else (*attack, codec),
        evaluate_every=training.evaluate_every,
    )


def _runs(
    methods: Sequence[str],
    seeds: Sequence[int],
    fleet: FleetOptions,
    training: TrainingOptions,
    sampling: fed.Sampling,
    engine: fed.EngineOptions,
    koala: fed.KoalaOptions,
    output: pathlib.Path | None,
    console: rich.console.Console,
) -> tuple[dict[str, list[fed.History]], dict[str, float]]:
    """Every method on every seed's split; prints the split, shows progress."""
    methods = _possible(methods, fleet, _run_options(training, sampling, engine), console)
    found: dict[str, list[fed.History]] = {name: [] for name in methods}
    saved: dict[str, float] = {}
    for seed in seeds:
        splits, partition = _splits(fleet, seed)
        classes = splits.train.classes
        models = [
            architectures.by_name(m, splits.train.shape, classes)
            for m in (fleet.large, *fleet.small)
        ]
        options = _run_options(dataclasses.replace(training, seed=seed), sampling, engine)
        saved = saved or report.pair_savings(models[0], models[1:], options.local)
        statistics = partition.statistics(splits.train.labels, classes)
        console.print(
            f"seed {seed}, {partition.rule}: {statistics}; {len(splits.proxy):,} proxy inputs"
        )
        for name in methods:
            with rich.progress.Progress(console=console, transient=len(methods) > 1) as bar:
                task = bar.add_task(name, total=options.rounds)

                def update(record: dict[str, Any], bar=bar, task=task) -> None:
                    bar.update(task, completed=record["round"] + 1)

                more = {"directory": output and output / f"{name}-seed{seed}", "on_round": update}
                pair = (models[0], models[1:])
                found[name].append(
                    run_method(name, splits, partition, pair, options, koala, **more)
                )
    return found, saved


def _possible(
    methods: Sequence[str],
    fleet: FleetOptions,
    options: fed.RunOptions,
    console: rich.console.Console,
) -> list[str]:
    """The methods that can run with the aggregator; says which of several cannot."""
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}.")
    out = [m for m in methods if hides_too_much(m, options, len(fleet.small))]
    kind = type(options.aggregator).__name__
    if out and len(out) == len(methods):
        raise ValueError(
            f"aggregator must show each client's update to {', '.join(out)}; got {kind}, which hides them; take koala-homo or fedavg-small."
        )
    if out:
        console.print(
            f"left out, as they read single clients' models and {kind} hides them: {', '.join(out)}"
        )
    return [m for m in methods if m not in out]


def _finish(
    runs: dict[str, list[fed.History]],
    saved: dict[str, float],
    target: float | None,
    given: dict[str, Any],
    output: pathlib.Path | None,
    json: pathlib.Path | None,
    console: rich.console.Console,
) -> None:
    console.print(report.table(runs, "test accuracy in %, totals of all rounds"))
    figures = ", ".join(f"{100 * v:.1f} % of {k.replace('_', ' ')}" for k, v in saved.items())
    console.print(f"a client with the small model saves, against one with the large: {figures}")
    if target is not None:
        for name, histories in runs.items():
            reached = [report.summary(h, target)["rounds_to_target"] for h in histories]
            console.print(f"rounds to {target:g}, {name}: {', '.join(map(str, reached))}")
    for line in dict.fromkeys(x for hs in runs.values() for h in hs for x in h.privacy):
        console.print(f"privacy: {line}")
    if output is not None:
        console.print(f"plot: {report.plot(runs, output / 'accuracy.png')}")
    if json is not None:
        ratios = {f"saved_{k}": v for k, v in saved.items()}
        found = make_report("fed", report.report_rows(runs, target), ratios)
        splits = {name: [h.partition for h in histories] for name, histories in runs.items()}
        spent = {name: [h.privacy for h in histories] for name, histories in runs.items()}
        write_report(json, found | {"options": given, "partitions": splits, "privacy": spent})


_Flat = tyro.conf.arg(name="")


def run(
    method: Annotated[str, tyro.conf.Positional] = "koala",
    fleet: Annotated[FleetOptions, _Flat] = FleetOptions(),
    training: Annotated[TrainingOptions, _Flat] = TrainingOptions(),
    sampling: fed.Sampling = fed.Sampling(),
    engine: fed.EngineOptions = fed.EngineOptions(),
    koala: fed.KoalaOptions = fed.KoalaOptions(),
    target: float | None = None,
    output: pathlib.Path | None = None,
    json: pathlib.Path | None = None,
) -> None:
    """Runs one federated method and reports accuracy, traffic, clients' compute and memory.

    Args:
      method: koala (homo for one client architecture, hete for several), fedavg-large, fedavg-small, fedprox, feddf, fedmd, fed-et,
        local-only or centralised.
      fleet: Data, clients and models.
      training: Rounds and clients' training.
      sampling: Who takes part and replies.
      engine: How cohorts are computed.
      koala: What the server does.
      target: Also report the rounds to this accuracy.
      output: Directory for checkpoints and a plot; an interrupted run there goes on.
      json: Also write a JSON report.
    """
    compare((method,), (), fleet, training, sampling, engine, koala, target, output, json)


def compare(
    methods: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        "fedavg-large",
        "koala-homo",
        "feddf",
        "fedmd",
    ),
    seeds: tuple[int, ...] = (),
    fleet: Annotated[FleetOptions, _Flat] = FleetOptions(),
    training: Annotated[TrainingOptions, _Flat] = TrainingOptions(),
    sampling: fed.Sampling = fed.Sampling(),
    engine: fed.EngineOptions = fed.EngineOptions(),
    koala: fed.KoalaOptions = fed.KoalaOptions(),
    target: float | None = None,
    output: pathlib.Path | None = None,
    json: pathlib.Path | None = None,
) -> None:
    """Runs several methods on identical splits, for one or more seeds, and reports them side by side.

    Args:
      methods: As for ``jaxmoe fed run``.
      seeds: One split and one run each; default: --seed.
      fleet: Data, clients and models.
      training: Rounds and clients' training.
      sampling: Who takes part and replies.
      engine: How cohorts are computed.
      koala: What KOALA's server does; its reverse steps also go for the other methods that distil, its augmentation for feddf and fed-et.
      target: Also report the rounds to this accuracy.
      output: Directory for checkpoints and a plot; interrupted runs there go on.
      json: Also write a JSON report.
    """
    console = rich.console.Console(soft_wrap=True, highlight=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    seeds = seeds or (training.seed,)
    runs, saved = _runs(methods, seeds, fleet, training, sampling, engine, koala, output, console)
    given = {
        name: dataclasses.asdict(options)
        for name, options in (
            ("fleet", fleet),
            ("training", training),
            ("sampling", sampling),
            ("engine", engine),
            ("koala", koala),
        )
    }
    _finish(runs, saved, target, given | {"seeds": seeds}, output, json, console)


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "compare": compare,
    "text": fed_text.text,
    "deploy": fed_deploy.run,
}


def main(args: Sequence[str]) -> None:
    """Runs ``jaxmoe fed`` with these arguments."""
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="jaxmoe fed",
        description="Federated transfer between small client models and a large server model.",
        args=list(args),
    )

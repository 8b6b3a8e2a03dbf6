"""Every method by its name, on one split: what the command line and the bench compare."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fed import baselines
from fed.data import Splits
from fed.distill import Distillation
from fed.history import History
from fed.koala import KoalaOptions, koala
from fed.models import Model
from fed.partition import Partition
from fed.rounds import RunOptions

METHODS = (
    "koala",
    "koala-homo",
    "koala-hete",
    "fedavg-large",
    "fedavg-small",
    "fedprox",
    "feddf",
    "fedmd",
    "fed-et",
    "local-only",
    "centralised",
)


def hides_too_much(method: str, options: RunOptions, architectures: int) -> bool:
    """Whether a method reads single clients' models, which the run's aggregator hides; ``run_method`` refuses such a pair.

    Args:
      method: one of ``METHODS``.
      options: of the run.
      architectures: of the clients.
    """
    reads = method in ("koala-hete", "feddf", "fedmd", "fed-et")
    return not options.aggregator.individual and (
        reads or (method == "koala" and architectures > 1)
    )


def run_method(
    method: str,
    splits: Splits,
    partition: Partition,
    models: tuple[Model, Sequence[Model]],
    options: RunOptions,
    koala_options: KoalaOptions = KoalaOptions(),
    **more: Any,
) -> History:
    """Runs a method by name.

    Splits, clients, local training and evaluation are the same for all. Of KOALA's server the reverse steps go for every method that
    distils, augmentation and copies for FedDF and Fed-ET. FedMD's clients fit as many steps, to a subset of 512 proxy inputs, drawn anew in
    each round and not augmented, as its parties must hold them. Learning rates, batch sizes and temperatures are each method's own.

    Args:
      method: one of ``METHODS``.
      splits: the data.
      partition: who holds what.
      models: the server's, and the clients' architectures; koala-homo, fedavg-small and fedprox use the first.
      options: of the run.
      koala_options: of KOALA's server, and of others' as said above.
      more: directory, on_round, assignment.

    Raises:
      ValueError: for another method, and as :func:`fed.run`.
      BadUpdate: as :func:`fed.run`.
      QuorumLost: as :func:`fed.run`.
    """
    large, small = models
    run = (splits, partition, options)
    if method.startswith("koala") and method in METHODS:
        how = _koala_options(method, len(small), koala_options)
        return koala(large, small[:1] if how.mode == "homo" else small, *run, how, **more)
    if method in ("feddf", "fedmd", "fed-et"):
        return _distilled(method, models, run, koala_options, more)
    if method == "fedavg-large":
        return baselines.fedavg(large, *run, **more)
    if method == "centralised":
        return baselines.centralised(large, *run, **more)
    if method == "fedavg-small":
        return baselines.fedavg(small[:1], *run, **more)
    if method == "fedprox":
        return baselines.fedprox(small[:1], *run, **more)
    if method == "local-only":
        return baselines.local_only(small, *run, **more)
    raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")


def _koala_options(method: str, architectures: int, how: KoalaOptions) -> KoalaOptions:
    """``how`` for the mode that the method's name says."""
    if method == "koala-homo" or (method == "koala" and architectures == 1):
        return dataclasses.replace(how, mode="homo", members="clusters", personal=False)
    return dataclasses.replace(how, mode="hete")


def _distilled(
    method: str,
    models: tuple[Model, Sequence[Model]],
    run: tuple[Splits, Partition, RunOptions],
    how: KoalaOptions,
    more: dict[str, Any],
) -> History:
    """The baselines that distil, with the steps of KOALA's server."""
    large, small = models
    same = {"augment": how.augment, "copies": how.copies}

    def stepped(given: Distillation) -> Distillation:
        return dataclasses.replace(given, steps=how.reverse.steps)

    if method == "feddf":
        df = baselines.DfOptions(stepped(baselines.DfOptions().distillation), **same)
        return baselines.feddf(small, *run, df, server=large, **more)
    if method == "fedmd":
        return baselines.fedmd(
            small, *run, baselines.MdOptions(stepped(baselines.MdOptions().digest)), **more
        )
    et = baselines.EtOptions(stepped(baselines.EtOptions().distillation), **same)
    return baselines.fedet(large, small, *run, et, **more)

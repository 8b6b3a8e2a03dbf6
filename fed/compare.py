"""Every method by its name, on one split: what the command line and the bench compare."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fed import baselines
from fed.data import Splits
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

    Args:
      method: one of ``METHODS``.
      splits: the data.
      partition: who holds what.
      models: the server's, and the clients' architectures; koala-homo and fedavg-small use the first.
      options: of the run.
      koala_options: of KOALA's server; its steps, augmentation and copies also go for every other method that distils.
      more: directory, on_round, assignment.
    """
    large, small = models
    how = koala_options
    same = {"augment": how.augment, "copies": how.copies}
    steps = how.reverse.steps
    if method.startswith("koala"):
        mode = (
            "homo" if method == "koala-homo" or (method == "koala" and len(small) == 1) else "hete"
        )
        chosen = small[:1] if mode == "homo" else small
        if mode == "homo":
            how = dataclasses.replace(how, members="clusters", personal=False)
        how = dataclasses.replace(how, mode=mode)
        return koala(large, chosen, splits, partition, options, how, **more)
    if method == "feddf":
        df = baselines.DfOptions()
        df = baselines.DfOptions(dataclasses.replace(df.distillation, steps=steps), **same)
        return baselines.feddf(small, splits, partition, options, df, server=large, **more)
    if method == "fedmd":
        digest = dataclasses.replace(baselines.MdOptions().digest, steps=steps)
        return baselines.fedmd(
            small, splits, partition, options, baselines.MdOptions(digest), **more
        )
    if method == "fed-et":
        et = baselines.EtOptions()
        et = baselines.EtOptions(dataclasses.replace(et.distillation, steps=steps), **same)
        return baselines.fedet(large, small, splits, partition, options, et, **more)
    if method in ("fedavg-large", "centralised"):
        run = baselines.fedavg if method == "fedavg-large" else baselines.centralised
        return run(large, splits, partition, options, **more)
    if method in ("fedavg-small", "fedprox", "local-only"):
        run = {
            "fedavg-small": baselines.fedavg,
            "fedprox": baselines.fedprox,
            "local-only": baselines.local_only,
        }[method]
        chosen = small if method == "local-only" else small[:1]
        return run(chosen, splits, partition, options, **more)
    raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")

"""An experiment as plain values, so that a server and its clients in other processes build the same one from a line of JSON."""

import dataclasses
import json
from typing import Any

from fed import architectures, data, partition
from fed.clients import LocalOptions
from fed.cohort import EngineOptions
from fed.compress import Codec
from fed.data import Splits
from fed.distill import Distillation
from fed.driver import run
from fed.history import History
from fed.koala import Koala, KoalaOptions
from fed.partition import Partition
from fed.rounds import Method, RunOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What a run needs.

    Attributes:
      method: what the server does.
      data: splits.
      partition: of ``data.train``.
      options: of the run.
      assignment: architecture of each client; None: in turn.
    """

    method: Method
    data: Splits
    partition: Partition
    options: RunOptions
    assignment: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """KOALA on a data set by name.

    Attributes:
      data: see ``fed.data.load``; images only.
      path: of its files; digits needs none.
      clients: how many.
      alpha: of the Dirichlet split.
      rounds: of communication.
      seed: of everything random.
      server: the large model, by ``architectures.by_name``.
      models: of the clients, in turn; one: homo, several: hete.
      epochs: local.
      batch_size: local.
      learning_rate: local.
      reverse_steps: small teach large, per round.
      forward_steps: large teaches small, per round.
      codec: of the updates (``fed.compress``).
      width: of the codec, if it has one.
    """

    data: str = "digits"
    path: str | None = None
    clients: int = 4
    alpha: float = 0.5
    rounds: int = 3
    seed: int = 0
    server: str = "mlp:256,256"
    models: tuple[str, ...] = ("mlp:16",)
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 0.1
    reverse_steps: int = 100
    forward_steps: int = 50
    codec: str = "none"
    width: int = 8

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Experiment":
        """What ``to_json`` wrote.

        Raises:
          ValueError: for text that is none.
        """
        try:
            values = json.loads(text)
            return cls(**values | {"models": tuple(values["models"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{text[:80]!r} is no experiment ({error}); write it with to_json."
            ) from None

    def build(self) -> Setup:
        """Data, models and options; the same wherever it is called."""
        train, test = data.load(self.data, self.path)
        splits = data.split(train, seed=self.seed, **({} if test is None else {"test": test}))
        shape, classes = splits.train.shape, splits.train.classes
        owners = partition.dirichlet(splits.train.labels, self.clients, self.alpha, self.seed)
        models = [architectures.by_name(name, shape, classes) for name in self.models]
        koala = KoalaOptions(
            mode="homo" if len(models) == 1 else "hete",
            reverse=Distillation(steps=self.reverse_steps),
            forward=Distillation(steps=self.forward_steps, features=0.1),
        )
        codec = Codec(self.codec, width=self.width)
        options = RunOptions(
            rounds=self.rounds,
            seed=self.seed,
            local=LocalOptions(
                epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate
            ),
            uploads=() if codec.lossless else (codec,),
        )
        method = Koala(architectures.by_name(self.server, shape, classes), models, koala)
        return Setup(method, splits, owners, options)

    def simulate(self, *, alone: bool = False, **more: Any) -> History:
        """Runs it in this process.

        Args:
          alone: compute each client by itself, as a node does, which is what a deployment gives, up to 1e-5. Otherwise many at once, where sums are rounded in
            another order; Adam's steps on the server make 1e-2 of that in a few hundred steps.
          more: as of ``fed.run``.
        """
        setup = self.build()
        if alone:
            engine = EngineOptions(chunk=1, buckets=1)
            setup = dataclasses.replace(
                setup, options=dataclasses.replace(setup.options, engine=engine)
            )
        return run(
            setup.method,
            setup.data,
            setup.partition,
            setup.options,
            assignment=setup.assignment,
            **more,
        )

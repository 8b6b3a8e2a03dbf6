"""What runs are made on: a model on rank processes, the requests for it, and what those give undisturbed."""

import dataclasses
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

import jax

from jaxmoe import checkpoint
from jaxmoe.config import ModelConfig
from jaxmoe.elastic.cluster.messages import Weights
from jaxmoe.elastic.cluster.processes import Cluster, ClusterOptions
from jaxmoe.elastic.experiment import checks
from jaxmoe.elastic.experiment.load import Ask, Load, undisturbed, workload
from jaxmoe.engine import Engine, EngineOptions
from jaxmoe.params import Params, init_params
from jaxmoe.presets import presets

# Few shapes, so that few programs have to be compiled; so few pages that requests now and then give way.
ENGINE = EngineOptions(max_running=6, max_step_tokens=16, page_size=8, pages=90, max_length=160)
WHOLE_S = 240.0  # a cluster that is not whole again after so long never will be


@dataclasses.dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
      name: as on the command line.
      weights: where ranks load it from.
      config: without MTP module.
    """

    name: str
    weights: Weights
    config: ModelConfig

    @classmethod
    def named(cls, name: str) -> "Model":
        """A preset with random weights, always the same, or a checkpoint's directory.

        Raises:
          ValueError: it is neither.
        """
        if name in presets:
            config, weights = presets[name], Weights(None)
        else:
            path = checkpoint.locate(name)
            config, weights = checkpoint.load_config(path), Weights(str(path))
        return cls(name, weights, config.replace(num_nextn_predict_layers=0))

    def params(self) -> Params:
        """The parameters on this process's device."""
        if self.weights.path is not None:
            return checkpoint.load(self.weights.path, mtp=False)[0]
        return init_params(self.config, jax.random.key(self.weights.seed))


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests, and the tokens that each of them has to give."""

    asks: tuple[Ask, ...]
    expected: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: Model, engine: EngineOptions = ENGINE) -> "Workload":
        """Computes the tokens on a single device."""
        asks = workload(model.config, engine.max_length)
        alone = dataclasses.replace(engine, pages=engine.max_running * engine.max_length)
        alone = dataclasses.replace(alone, pages=alone.pages // engine.page_size)
        return cls(tuple(asks), tuple(undisturbed(model.params(), model.config, asks, alone)))


class Stand:
    """A cluster under test; use it as a context.

    Args:
      model: what it serves.
      load: with which requests.
      options: of the cluster.
      engine: sizes.
      clients: of the closed loop.

    Attributes:
      cluster, engine: what is tested.
      start_s: how long its start took.
      orphans: processes of ranks that were still there after the end.
    """

    def __init__(
        self,
        model: Model,
        load: Workload,
        options: ClusterOptions,
        engine: EngineOptions = ENGINE,
        clients: int = 12,
    ):
        self.model, self.workload, self.options = model, load, options
        self._engine_options, self._clients = engine, clients
        self.pids: set[int] = set()
        self.orphans: list[int] = []

    def __enter__(self) -> "Stand":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def start(self) -> None:
        """Starts all processes and compiles, or loads, all programs."""
        began = time.monotonic()
        self.cluster = Cluster(self.model.weights, self.model.config, self.options)
        self.engine = Engine(
            None, self.model.config, options=self._engine_options, cluster=self.cluster
        )
        try:
            self.engine.warmup()
        except BaseException:
            self.engine.close()
            raise
        self._whole = self._states()
        self.baseline = checks.Resources.now()
        self.start_s = time.monotonic() - began

    def end(self) -> None:
        """Ends everything, and looks for what is left."""
        self.note_pids()
        self.engine.close()
        self.orphans = checks.orphans(self.pids)

    def load(self, seed: int) -> Load:
        """Clients that are to be started."""
        return Load(self.engine, self.workload.asks, self._clients, seed)

    def note_pids(self) -> None:
        """Remembers the processes of this moment: all have to be gone in the end."""
        self.pids |= {*self.cluster.pids.values(), *self.cluster.starting_pids.values()}

    def _states(self) -> Counter[str]:
        return Counter(rank.state for rank in self.cluster.status().ranks)

    def wait_until_whole(self, timeout_s: float = WHOLE_S) -> bool:
        """Until as many ranks as at first take part, and as many wait; those that have left as planned are called back."""
        end, called = time.monotonic() + timeout_s, dict[int, Future[Any]]()
        while (states := self._states()) != self._whole:
            self.note_pids()
            for rank in self.cluster.status().ranks:
                if rank.state == "drained" and states["drained"] > self._whole["drained"]:
                    if rank.rank not in called or called[rank.rank].done():
                        called[rank.rank] = self.cluster.resume(rank.rank)
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

"""A round of the same model and clients on Flower's own simulation (Ray), for ``bench.fed_round``."""

import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class FlowerRounds:
    """What Flower took.

    Attributes:
      seconds: of each warm round; the first one, which starts the actors and compiles, is ``first``.
      first: seconds of the first round.
      losses: mean loss of the clients in each round, first included, to check that the work was the same.
    """

    seconds: list[float]
    first: float
    losses: list[float]


def missing() -> str | None:
    """Why there is no comparison, or None."""
    for name in ("flwr", "ray"):
        try:
            __import__(name)
        except ImportError:
            return f"{name} isn't installed here: pip install 'jaxmoe[flower]', in an environment of its own"
    return None


def compare(
    side: int, clients: int, rounds: int, engine: Any
) -> tuple[list[dict], dict[str, float]]:
    """Rows and the ratio of a warm round of ``clients`` on Flower's simulation over one of ours; same model, data, batches and start.

    The two cannot take turns: Flower's simulation is one call. Ours runs after it, in the same process, when its actors are gone.
    """
    import jax

    from bench import _harness
    from fed.driver import Driver

    setup = _setup(side, clients)
    theirs = simulate(side, clients, rounds, os.cpu_count() or 1)
    setup = dataclasses.replace(setup, options=dataclasses.replace(setup.options, engine=engine))
    driver = Driver(setup.method, setup.data, setup.partition, setup.options, None)
    state, _ = driver.begin(None)
    (cohort,) = driver.train(state, driver.plan(0), 0)
    if not abs(float(cohort.loss.mean()) - theirs.losses[0]) < 1e-4:
        raise SystemExit(
            f"the two sides must train alike; mean losses are {cohort.loss.mean()} and {theirs.losses[0]}."
        )

    def ours() -> None:
        jax.block_until_ready(driver.train(state, driver.plan(0), 0)[0].mean)

    seconds = _harness.interleave({"ours": _harness.timed(ours)}, rounds=max(rounds, 5))["ours"]
    middle = float(np.median(theirs.seconds)), float(np.median(seconds))
    rows = [
        {"name": f"flower, round of {clients} clients", "value": middle[0], "unit": "s", "best": min(theirs.seconds),
         "worst": max(theirs.seconds), "rounds": len(theirs.seconds), "first": theirs.first},
        {"name": f"vmapped, round of the same {clients} clients", "value": middle[1], "unit": "s", "best": min(seconds),
         "worst": max(seconds), "rounds": len(seconds)},
    ]  # fmt: skip
    return rows, {"vmapped over flower": middle[0] / middle[1]}


@functools.cache
def _setup(side: int, clients: int) -> Any:
    """The bench's MLP and clients, 40 examples each in batches of 20, as a ``Setup`` of plain averaging; one per process, so that it compiles once."""
    import fed
    from fed.experiment import Setup

    generator = np.random.default_rng(0)

    def data(count: int) -> Any:
        labels = generator.integers(0, 10, count).astype(np.int32)
        return fed.Dataset(generator.random((count, side, side), np.float32), labels, 10, "noise")

    train, few = data(40 * clients), data(10)
    splits = fed.Splits(train, few.unlabelled(np.arange(10)), few, few, {})
    local = fed.LocalOptions(epochs=1, batch_size=20, learning_rate=0.05)
    partition = fed.partition.iid(len(train), clients, 0)
    model = fed.architectures.mlp((side, side), (16,), 10)
    return Setup(fed.Method([model]), splits, partition, fed.RunOptions(local=local, rounds=100))


def simulate(side: int, clients: int, rounds: int, cores: int) -> FlowerRounds:
    """Warm rounds of FedAvg with every client on Ray actors, ``cores`` of them, each of which keeps its compiled step.

    The client is ``fed.flower.train_client``: the same schedule, key and local training as in our own round. Nothing is evaluated and
    the server only averages, by Flower's own FedAvg.

    Args:
      side: of the images.
      clients: how many.
      rounds: after the first one.
      cores: actors.
    """
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import jax
    from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from fed.driver import Driver
    from fed.flower import from_arrays, to_arrays, train_client

    setup = _setup(side, clients)
    driver = Driver(setup.method, setup.data, setup.partition, setup.options, setup.assignment)
    limits, begin = driver.fleet.steps, to_arrays(driver.begin(None)[0].small[0])
    times, losses = [], []
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        client, setup = int(context.node_config["partition-id"]), _setup(side, clients)
        params = from_arrays(message.content["arrays"], setup.method.models[0].shapes)
        number = int(message.content["config"]["server-round"]) - 1
        update, _, metrics = train_client(setup, client, params, number, int(limits[client]))
        trained = jax.tree.map(lambda p, u: np.asarray(p) + u, params, update)
        kept = {k: metrics[k] for k in ("num-examples", "loss")}
        content = RecordDict({"arrays": to_arrays(trained), "metrics": MetricRecord(kept)})
        return Message(content, reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            times.append(time.perf_counter())
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            if len(replies) != clients or any(r.has_error() for r in replies):
                errors = [r.error.reason for r in replies if r.has_error()]
                raise RuntimeError(
                    f"{len(replies)} of {clients} clients replied; errors: {errors[:1]}"
                )
            losses.append(float(np.mean([r.content["metrics"]["loss"] for r in replies])))
            found = super().aggregate_train(server_round, replies)
            times.append(time.perf_counter())
            return found

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=clients,
        )
        strategy.start(grid, begin, num_rounds=1 + rounds, train_config=ConfigRecord())

    with tempfile.TemporaryDirectory() as home:
        os.environ["FLWR_HOME"] = str(pathlib.Path(home))
        run_simulation(
            server_app,
            client_app,
            clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {
                    "num_cpus": cores,
                    "include_dashboard": False,
                    "log_to_driver": False,
                },
            },
        )
    spans = [b - a for a, b in zip(times[::2], times[1::2], strict=True)]
    return FlowerRounds(spans[1:], spans[0], losses)

"""The same client and the same server on Flower: real processes, real devices, messages instead of vmapped clients.

The client trains by ``cohort.train_cohort`` with itself as the only member; the server is ``fed.driver.Driver`` whose cohorts come out of
messages. What is random is a function of (seed, round, client) in both, so that a deployment and a simulation of one experiment give the same
models up to rounding: to a few 1e-6 where the simulation too computes one client at a time (``Experiment.simulate(alone=True)``), else up to what
an optimiser makes of it. Each message goes to one node, so that every client gets the parameters of its own architecture.

Not so what privacy needs: a client's noise comes from its own system and its loss stays with it (``DpSgd``); the server's noise, and which clients
it draws (``GaussianMean``), don't follow from the seed, which all know. Secure aggregation isn't done over messages. And a server builds the
same ``Setup`` as its clients, so it has all of ``data.train`` on its disk and in memory, although it only evaluates and counts labels: what is
shown here is the protocol, and hiding the data from the server needs a ``build`` whose training set there is a stand-in of the same sizes.

A node that dies takes its work with it. The grid notices that a node which serves the same client has come (back), sends the work
again, and the round completes with everybody; if nobody comes before the timeout it completes with the others (``fed.flower_grid``).

Flower's and this project's dependencies exclude each other in part: install the extra "flower" in an environment of its own
(docs/federated.md).
"""

import dataclasses
import importlib
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fed.cohort import Cohort, EngineOptions, join, train_cohort, weighted_mean
from fed.compress import Codec
from fed.driver import Driver, training_key
from fed.experiment import Experiment, Setup
from fed.flower_grid import PatientGrid
from fed.history import History
from fed.models import Params
from fed.privacy import GaussianMean, check_private, secret_key, spent
from fed.sampling import Plan
from fed.schedule import Bucket, buckets
from fed.secure_aggregation import SecureMean

try:
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import Strategy
except ImportError as error:
    raise ImportError(
        "fed.flower needs flwr and it isn't installed: pip install 'jaxmoe[flower]', in an environment of its own."
    ) from error

Build = Callable[[dict[str, Any]], Setup]


def build_experiment(config: dict[str, Any]) -> Setup:
    """The setup that a run's configuration asks for: ``experiment`` as JSON, or ``build`` as MODULE:FUNCTION of the user's own.

    Raises:
      ValueError: if it has neither.
    """
    if config.get("build"):
        module, _, name = str(config["build"]).partition(":")
        return getattr(importlib.import_module(module), name)(config)
    if config.get("experiment"):
        return Experiment.from_json(str(config["experiment"])).build()
    raise ValueError(
        "the run's configuration must have experiment (JSON) or build (MODULE:FUNCTION); got neither."
    )


# -- trees and records -----------------------------------------------------------------------------


def to_arrays(tree: Any) -> ArrayRecord:
    """A tree's leaves by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ArrayRecord({_name(p): FlowerArray(np.asarray(x)) for p, x in leaves})


def from_arrays(record: ArrayRecord, like: Any) -> Any:
    """The tree, in the structure of ``like``.

    Raises:
      ValueError: for missing or further arrays, or another shape or dtype.
    """
    arrays = {name: array.numpy() for name, array in record.items()}
    paths = jax.tree_util.tree_leaves_with_path(like)
    names = [_name(p) for p, _ in paths]
    if set(names) != set(arrays):
        raise ValueError(
            f"arrays must be {sorted(names)}; got {sorted(arrays)}. Both sides must build one model."
        )
    for name, (_, leaf) in zip(names, paths, strict=True):
        found = arrays[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise ValueError(
                f"{name} must be {leaf.dtype}{list(leaf.shape)}; got {found.dtype}{list(found.shape)}. Both sides must build one model."
            )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[n] for n in names])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# -- client ----------------------------------------------------------------------------------------


def train_client(
    setup: Setup, client: int, params: Params, round_number: int, limit: int
) -> tuple[Params, bytes | None, dict[str, float]]:
    """One client's part of a round: (update, payload if updates are compressed, metrics).

    It reads the client's own examples and no others. Under a private rule what it draws comes from the system, not from the seed, which the server
    knows, and the metrics have no loss, which isn't noised.

    Args:
      setup: of the run.
      client: its number.
      params: where it starts.
      round_number: from zero.
      limit: most steps.
    """
    options, model = setup.options, setup.method.models[_architecture(setup, client)]
    own, local = np.asarray(setup.partition[client]), options.local
    mine = setup.data.train.take(own)
    codec = options.uploads[-1] if options.uploads else None
    encodes = isinstance(codec, Codec)
    private = getattr(local.gradient, "private", False)
    cohort = train_cohort(
        model,
        params,
        (jnp.asarray(mine.inputs), jnp.asarray(mine.labels)),
        _schedule(setup, client, round_number, limit),
        secret_key() if private else training_key(options.seed, round_number),
        local,
        EngineOptions(chunk=1, buckets=1),
        weights=setup.partition.sizes.astype(np.float32),
        uploads=options.uploads[:-1] if encodes else options.uploads,
        keep=True,
    )
    update = jax.tree.map(lambda x: np.asarray(x[0]), cohort.updates)
    payload = codec.encode(update) if encodes and bool(cohort.accepted[0]) else None
    metrics = {
        "num-examples": float(len(own)),
        "steps": int(cohort.steps[0]),
        "examples": int(cohort.examples[0]),
    }
    if not private:
        metrics["loss"] = float(cohort.loss[0])
    return update, payload, metrics


def _schedule(setup: Setup, client: int, round_number: int, limit: int) -> list[Bucket]:
    """The client's steps as in a simulation, its examples numbered among its own."""
    own, local = np.asarray(setup.partition[client]), setup.options.local
    place = np.zeros(setup.partition.total, np.int32)
    place[own] = np.arange(len(own), dtype=np.int32)
    made = buckets(
        setup.partition,
        [client],
        seed=setup.options.seed,
        round_number=round_number,
        epochs=local.epochs,
        batch_size=local.batch_size,
        steps=local.steps,
        limits=np.array([limit]),
    )
    return [Bucket(b.clients, place[b.index], b.mask) for b in made]


def _architecture(setup: Setup, client: int) -> int:
    if setup.assignment is not None:
        return int(setup.assignment[client])
    return client % len(setup.method.models)


def make_client_app(build: Build = build_experiment) -> ClientApp:
    """A ``ClientApp``; a node's configuration says which client it is: ``client=3``."""
    app = ClientApp()

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        """Which client this node is."""
        said = ConfigRecord({"client": _client(context)})
        return Message(RecordDict({"config": said}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Local training from the parameters in the message."""
        setup, client = build(dict(context.run_config)), _client(context)
        asked = message.content["config"]
        if asked["client"] != client:
            raise ValueError(f"this node is client {client} and was asked to be {asked['client']}.")
        model = setup.method.models[_architecture(setup, client)]
        params = from_arrays(message.content["arrays"], model.shapes)
        update, payload, metrics = train_client(
            setup, client, params, int(asked["round"]), int(asked["limit"])
        )
        reply: dict[str, Any] = {"client": client, "round": int(asked["round"])}
        content = RecordDict({"metrics": MetricRecord(metrics)})
        if payload is None:
            content["arrays"] = to_arrays(update)
        else:
            reply["payload"] = payload
        content["config"] = ConfigRecord(reply)
        return Message(content, reply_to=message)

    return app


def _client(context: Context) -> int:
    if "client" not in context.node_config:
        raise ValueError(
            "a node must know which client it is; got no client in --node-config. Start it with --node-config client=0."
        )
    return int(context.node_config["client"])


# -- server ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Reply:
    """What a client sent; a loss that it keeps for itself is NaN."""

    update: Params
    metrics: dict[str, float]
    nbytes: int


def cohort_of(driver: Driver, replies: list[tuple[int, _Reply]]) -> Cohort:
    """As ``train_cohort`` makes it: sums in order of clients, float32, of what is finite and not too large."""
    if not replies:
        return join([])
    clients = np.array([k for k, _ in replies], np.int32)
    norms = np.array([_norm(r.update) for _, r in replies], np.float32)
    accepted = np.isfinite(norms) & (norms <= driver.options.engine.largest_norm)
    weights = np.where(accepted, driver.context.sizes[clients], 0).astype(np.float32)
    updates = jax.tree.map(lambda *x: jnp.stack(x), *(r.update for _, r in replies))
    mean = weighted_mean(updates, jnp.asarray(weights)) if accepted.any() else None
    figures = {
        name: np.array([r.metrics[name] for _, r in replies])
        for name in ("loss", "steps", "examples")
    }
    return Cohort(
        clients,
        accepted,
        weights,
        figures["loss"].astype(np.float32),
        figures["steps"].astype(np.int32),
        figures["examples"].astype(np.int32),
        norms,
        mean,
        updates,
    )


def _norm(tree: Params) -> float:
    return float(
        np.sqrt(sum(np.square(np.asarray(x, np.float32)).sum() for x in jax.tree.leaves(tree)))
    )


class KoalaStrategy(Strategy):
    """A ``Strategy`` around any ``fed.rounds.Method``; Flower's rounds are numbered from one, the driver's from zero.

    ``aggregate_train`` gives None, and so leaves everything as it was, where the quorum fails.

    Attributes:
      records: of every round, as of ``fed.rounds.run``.
      state: after the last one.
      nodes: node of each client; ``PatientGrid`` keeps it up to date.

    Raises:
      ValueError: for asynchronous arrival, secure aggregation, and private rules that ``check_private`` refuses. Dropout and deadlines of
        ``Sampling`` are simulated here too: who would miss a round isn't asked.
    """

    def __init__(self, setup: Setup):
        options = setup.options
        if options.sampling.buffer:
            raise ValueError(
                f"buffer must be 0, Flower's rounds are synchronous; got {options.sampling.buffer}. Simulate asynchronous arrival."
            )
        if isinstance(options.aggregator, SecureMean):
            raise ValueError(
                "aggregator must not be SecureMean, clients here send their updates as they are; got SecureMean. Simulate it, or take Mean."
            )
        hidden = isinstance(options.aggregator, GaussianMean)
        if hidden:  # who is drawn; the key below is the noise's
            options = dataclasses.replace(options, seed=secrets.randbits(63))
        self._driver = Driver(setup.method, setup.data, setup.partition, options, setup.assignment)
        if hidden:
            self._driver.key = secret_key()
        check_private(options, setup.partition.sizes, self._driver.context.assignment)
        self.setup = setup
        self.state, self.records = self._driver.begin(None)
        self.nodes: dict[int, int] = {}
        self._owners: dict[int, int] = {}  # of nodes that were asked, replaced ones too

    def plan(self, server_round: int) -> Plan:
        """Who is asked in a round: as in the simulation."""
        return self._driver.plan(server_round - 1)

    def arrays(self) -> ArrayRecord:
        """The server's model, or where there is none the first small one."""
        return to_arrays(self.state.small[0] if self.state.large is None else self.state.large)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        """A message per client that is asked and has a node, with its own architecture's parameters."""
        plan, messages = self.plan(server_round), []
        for client, limit in zip(plan.replied.tolist(), plan.limits.tolist(), strict=True):
            if client not in self.nodes:
                continue
            a = self._driver.context.assignment[client]
            if self.state.personal is None:
                params = self.state.small[a]
            else:
                row = self._driver.context.rows[client]
                params = jax.tree.map(lambda x, row=row: x[row], self.state.personal[a])
            said = {"client": client, "round": server_round - 1, "limit": limit}
            content = RecordDict({"arrays": to_arrays(params), "config": ConfigRecord(said)})
            self._owners[self.nodes[client]] = client
            messages.append(
                Message(content, self.nodes[client], "train", group_id=str(server_round))
            )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The server's part of the round. A reply that cannot be used counts as none and is named in the record's "errors"."""
        arrived, errors = {}, []
        self._owners |= {node: client for client, node in self.nodes.items()}
        for message in replies:
            if message.has_error():
                errors.append(message.error.reason)
                continue
            client = self._owners.get(message.metadata.src_node_id)
            try:
                arrived[client] = self._read(message, server_round, client)
            except Exception as error:  # whatever one message holds, it must not end the run
                errors.append(f"client {client}: {type(error).__name__}: {error}")
        driver, plan = self._driver, self.plan(server_round)
        cohorts = []
        for a in range(len(driver.method.models)):
            own = [k for k in sorted(arrived) if driver.context.assignment[k] == a]
            cohorts.append(cohort_of(driver, [(k, arrived[k]) for k in own]))
        self.state, record = driver.finish(self.state, plan, cohorts, server_round - 1)
        wanted = set(plan.replied.tolist())
        record |= {
            "replied": len(arrived),
            "missing": sorted(wanted - set(arrived)),
            "errors": errors,
            "bytes_up": sum(r.nbytes for r in arrived.values()),
        }
        self.records.append(record)
        figures = {k: v for k, v in record.items() if isinstance(v, int | float)}
        metrics = MetricRecord({k: v for k, v in figures.items() if not isinstance(v, bool)})
        return (None if record["skipped"] else self.arrays()), metrics

    def _read(self, message: Message, server_round: int, client: int | None) -> _Reply:
        """A reply of ``client``, which the node says, not the message."""
        content, said = message.content, message.content["config"]
        asked = {"client": client, "round": server_round - 1}
        if client is None or {name: said[name] for name in asked} != asked:
            raise ValueError(
                f"a reply must be of a client that was asked in round {server_round - 1}; got client {said['client']} in round {said['round']}."
            )
        shapes = self.setup.method.models[self._driver.context.assignment[client]].shapes
        counts = {name: int(content["metrics"][name]) for name in ("steps", "examples")}
        metrics = counts | {"loss": float(content["metrics"].get("loss", float("nan")))}
        if "payload" in said:
            payload = said["payload"]
            update = self.setup.options.uploads[-1].decode(payload, shapes)
            return _Reply(jax.tree.map(np.asarray, update), metrics, len(payload))
        update = from_arrays(content["arrays"], shapes)
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(update))
        return _Reply(update, metrics, size)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        """Nothing: the server evaluates, as in the simulation."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing."""
        return None

    def summary(self) -> None:
        """Nothing to add to Flower's own lines."""

    def history(self) -> History:
        """The run's result."""
        return self._driver.history(self.state, self.records)


def make_server_app(build: Build = build_experiment) -> ServerApp:
    """A ``ServerApp``.

    The run's configuration: what ``build`` reads; ``output``, a directory that gets events.jsonl, history.json and models.npz;
    ``node-timeout-s`` and ``round-timeout-s``; ``concurrency``, clients that work at the same time at most (0: all).
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        """All rounds."""
        config = dict(context.run_config)
        folder = pathlib.Path(str(config["output"]))
        folder.mkdir(parents=True, exist_ok=True)

        def note(name: str, **details: Any) -> None:
            with (folder / "events.jsonl").open("a") as file:
                file.write(json.dumps({"event": name, "time": time.time(), **details}) + "\n")

        note("server")
        setup = build(config)
        strategy = KoalaStrategy(setup)
        privacy = spent(
            setup.options, setup.options.rounds
        )  # before, not to fail after, the rounds
        clients = [k for k in range(len(setup.partition)) if setup.partition.sizes[k]]
        together = int(config.get("concurrency", 0))
        patient = PatientGrid(grid, strategy.nodes, clients, concurrency=together, on_event=note)
        patient.wait_for_nodes(float(config.get("node-timeout-s", 120.0)))
        note("begin")
        strategy.start(
            patient,
            strategy.arrays(),
            num_rounds=setup.options.rounds,
            timeout=float(config.get("round-timeout-s", 300.0)),
        )
        save_result(folder, strategy.history(), privacy)
        note("end")

    return app


def save_result(folder: pathlib.Path, history: History, privacy: Sequence[str] = ()) -> None:
    """Writes a run's records and ``privacy.spent`` as history.json and its models as models.npz; the former last, whole."""
    models = {"large": history.large, "small": history.small}
    np.savez(folder / "models.npz", **dict(named(models)))
    temporary = folder / "history.json.tmp"
    saved = {"method": history.method, "rounds": history.rounds, "privacy": list(privacy)}
    temporary.write_text(json.dumps(saved))
    os.replace(temporary, folder / "history.json")


def named(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Leaves as NumPy arrays, by path."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _name(path), np.asarray(leaf)

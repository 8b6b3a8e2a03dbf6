"""The Flower apps: what messages hold, the same models as the simulation, and rounds in which nodes die; a real deployment is slow."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the extra flower, in an environment of its own")
pytest.importorskip("sklearn")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fed import flower
from fed.deployment import DeployOptions, Kill, deploy, killed_mid_round
from fed.experiment import Experiment
from fed.flower_grid import PatientGrid
from fed.privacy import DpSgd, GaussianMean, dp_options
from fed.sampling import Sampling
from fed.secure_aggregation import SecureMean

EXPERIMENT = Experiment(
    clients=3,
    rounds=2,
    epochs=1,
    reverse_steps=4,
    forward_steps=3,
    server="mlp:12",
    models=("mlp:6", "mlp:5"),
)


class Loopback:
    """A grid whose nodes are called at once; real messages, contexts and apps, no network.

    A node in ``dying`` takes one training message and is then gone; ``births`` come when it is. Nodes in ``mute`` fail once when they are
    asked who they are. ``tamper`` has what is done to the replies of a node.
    """

    def __init__(self, experiment, clients, dying=(), births=(), mute=(), tamper=None):
        self.app = flower.make_client_app()
        self.config = {"experiment": experiment.to_json()}
        self.nodes = {100 + k: self._context(100 + k, k) for k in clients}
        self.dying, self.births, self.replies = set(dying), list(births), {}
        self.mute, self.tamper = set(mute), tamper or {}
        self.pushed = []

    def _context(self, node, client):
        return Context(7, node, {"client": client}, RecordDict(), self.config)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            numbers.append(message.object_id)
            node = message.metadata.dst_node_id
            self.pushed.append((message.metadata.message_type, node))
            if node in self.dying and message.metadata.message_type == "train":
                self.dying.remove(node)
                context = self.nodes.pop(node)
                for new in self.births:
                    self.nodes[new] = self._context(new, context.node_config["client"])
                continue
            context = self.nodes[node]
            try:
                if node in self.mute:
                    self.mute.remove(node)
                    raise ValueError("busy")
                reply = self.app(message, context)
                if message.metadata.message_type == "train" and node in self.tamper:
                    self.tamper[node](reply.content)
            except ValueError as error:
                reply = Message(Error(0, str(error)), reply_to=message)
            self.replies[message.object_id] = reply
        return numbers

    def pull_messages(self, numbers):
        return [self.replies.pop(n) for n in numbers if n in self.replies]


def run(experiment, timeout=60.0, concurrency=0, **faults):
    strategy = flower.KoalaStrategy(experiment.build())
    events = []
    grid = Loopback(experiment, range(experiment.clients), **faults)
    patient = PatientGrid(
        grid, strategy.nodes, range(experiment.clients), poll_s=0.01, concurrency=concurrency,
        on_event=lambda name, **details: events.append((name, details.get("client"))),
    )  # fmt: skip
    patient.wait_for_nodes(5.0)
    result = strategy.start(
        patient, strategy.arrays(), num_rounds=experiment.rounds, timeout=timeout
    )
    return strategy, result, events, grid


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """Who sends messages; Flower's processes set it when they begin."""
    identify(lambda name, value: monkeypatch.setattr(TaskIdentity, name, value))


def identify(put):
    for name, value in (("_task_id", 5), ("_run_id", 7), ("_node_id", 1)):
        put(name, value)


@pytest.fixture(scope="module")
def simulated():
    return EXPERIMENT.simulate(alone=True)


def difference(strategy, history):
    one = dict(flower.named({"large": strategy.state.large, "small": strategy.state.small}))
    two = dict(flower.named({"large": history.large, "small": history.small}))
    assert set(one) == set(two)
    return max(float(np.abs(one[k] - two[k]).max()) for k in one)


def test_messages_give_the_same_models_and_metrics_as_the_simulation(simulated):
    strategy, result, _, _ = run(EXPERIMENT)
    assert difference(strategy, simulated) < 1e-5
    ours, theirs = strategy.records[-1], simulated.rounds[-1]
    for key in ("large_accuracy", "small_accuracy", "loss", "reverse_loss", "forward_loss"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key
    assert ours["bytes_up"] == theirs["bytes_up"]
    large = flower.from_arrays(result.arrays, strategy.setup.method.server.shapes)
    assert all(
        np.array_equal(*x)
        for x in zip(*map(jax.tree.leaves, (large, strategy.state.large)), strict=True)
    )


def test_compressed_updates_arrive_as_the_simulation_has_them():
    small = dataclasses.replace(EXPERIMENT, codec="sefp", width=5, rounds=1)
    strategy, _, _, _ = run(small)
    history = small.simulate(alone=True)
    # A value at the edge between two steps of the format may fall to either side.
    assert difference(strategy, history) < 2e-2
    assert strategy.records[0]["bytes_up"] == history.rounds[0]["bytes_up"]


def test_work_of_a_node_that_died_goes_to_the_one_that_takes_its_place(simulated):
    strategy, _, events, grid = run(EXPERIMENT, concurrency=1, dying=(101,), births=(201,))
    assert strategy.records[0]["missing"] == [] and strategy.nodes[1] == 201
    assert ("again", 1) in events and grid.pushed.count(("train", 101)) == 1
    assert difference(strategy, simulated) < 1e-5


def test_a_round_goes_on_without_a_node_that_does_not_come_back():
    once = dataclasses.replace(EXPERIMENT, rounds=1)
    strategy, _, _, _ = run(once, timeout=1.0, dying=(101,))
    assert strategy.records[0]["missing"] == [1] and strategy.records[0]["replied"] == 2


def test_a_failed_quorum_leaves_everything_as_it_was():
    setup = dataclasses.replace(EXPERIMENT, rounds=1).build()
    strategy = flower.KoalaStrategy(setup)
    before = jax.tree.leaves(strategy.state)
    arrays, _ = strategy.aggregate_train(1, [])
    assert arrays is None and strategy.records[0]["skipped"]
    assert all(a is b for a, b in zip(before, jax.tree.leaves(strategy.state), strict=True))


def test_an_error_of_a_client_is_kept_with_the_round(simulated):
    strategy = flower.KoalaStrategy(EXPERIMENT.build())
    strategy.nodes.update({0: 100, 1: 101, 2: 102})
    (first, *_) = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), None)
    first.metadata.__dict__["_message_id"] = "x"
    strategy.aggregate_train(1, [Message(Error(0, "out of memory"), reply_to=first)])
    assert strategy.records[0]["errors"] == ["out of memory"]


def test_missing_nodes_and_wrong_arrays_are_named():
    strategy = flower.KoalaStrategy(EXPERIMENT.build())
    grid = Loopback(EXPERIMENT, (0, 2))
    with pytest.raises(TimeoutError, match=r"clients \[1\] have no node"):
        PatientGrid(grid, strategy.nodes, range(3), poll_s=0.01).wait_for_nodes(0.1)
    shapes = strategy.setup.method.server.shapes
    record = flower.to_arrays(jax.tree.map(lambda x: np.zeros(x.shape, np.float16), shapes))
    with pytest.raises(ValueError, match="must be float32"):
        flower.from_arrays(record, shapes)
    with pytest.raises(ValueError, match="build one model"):
        flower.from_arrays(flower.to_arrays({"x": np.zeros(2)}), shapes)


def spoil(record, **values):
    """Changes entries of a reply's record."""

    def change(content):
        content[record] = type(content[record])(dict(content[record].items()) | values)

    return change


def test_replies_that_cannot_be_used_are_named_and_do_not_end_the_run():
    once = dataclasses.replace(EXPERIMENT, clients=6, rounds=1, codec="int8")

    def short(content):
        spoil("config", payload=content["config"]["payload"][:-5])(content)

    def unlike(content):
        del content["config"]["payload"]
        content["arrays"] = flower.to_arrays({"x": np.zeros(2)})

    tamper = {
        100: spoil("config", round=4),
        101: spoil("config", client=5),  # in another's name
        102: short,
        103: unlike,
        104: spoil("metrics", steps=[1, 2]),
    }
    strategy, _, _, _ = run(once, tamper=tamper)
    (record,) = strategy.records
    assert record["missing"] == [0, 1, 2, 3, 4] and record["replied"] == 1
    for client, said in enumerate(
        ("in round 4", "got client 5", "damaged", "build one model", "int")
    ):
        (line,) = (e for e in record["errors"] if e.startswith(f"client {client}: "))
        assert said in line and "\n" not in line


def test_a_node_that_fails_to_say_who_it_is_is_asked_again():
    strategy = flower.KoalaStrategy(EXPERIMENT.build())
    grid = Loopback(EXPERIMENT, range(3), mute=(101,))
    PatientGrid(grid, strategy.nodes, range(3), poll_s=0.01).wait_for_nodes(5.0)
    assert strategy.nodes == {0: 100, 1: 101, 2: 102}


def test_a_private_client_keeps_its_noise_and_its_loss():
    setup = EXPERIMENT.build()
    local = dp_options(DpSgd(noise_multiplier=0.1, rate=0.5), int(setup.partition.sizes.max()), 2)
    setup = dataclasses.replace(setup, options=dataclasses.replace(setup.options, local=local))
    params = flower.KoalaStrategy(setup).state.small[0]
    (one, _, metrics), (two, _, _) = (flower.train_client(setup, 0, params, 0, 2) for _ in range(2))
    assert "loss" not in metrics and metrics["steps"] == 2
    # What the server could compute from the seed would be the same twice.
    assert not np.allclose(*(x["head"]["kernel"] for x in (one, two)))


def test_what_messages_cannot_keep_secret_is_refused_and_a_private_mean_does_not_follow_the_seed():
    setup = dataclasses.replace(EXPERIMENT, models=("mlp:6",)).build()

    def of(**options):
        return dataclasses.replace(setup, options=dataclasses.replace(setup.options, **options))

    with pytest.raises(ValueError, match="must not be SecureMean"):
        flower.KoalaStrategy(of(aggregator=SecureMean()))
    private = {"aggregator": GaussianMean(expected_clients=1.5), "rounds": 40}
    with pytest.raises(ValueError, match="sampler='uniform'"):
        flower.KoalaStrategy(of(**private, sampling=Sampling(participation=0.5)))
    drawn = of(**private, sampling=Sampling(participation=0.5, sampler="poisson"))
    one, two = (flower.KoalaStrategy(drawn) for _ in range(2))
    plans = [[s.plan(n).replied.tolist() for n in range(1, 41)] for s in (one, two)]
    assert plans[0] != plans[1]
    assert not np.array_equal(*(jax.random.key_data(s._driver.key) for s in (one, two)))


def test_a_result_says_what_privacy_it_cost(tmp_path):
    strategy = flower.KoalaStrategy(EXPERIMENT.build())
    strategy.aggregate_train(1, [])
    flower.save_result(tmp_path, strategy.history(), ["(1, 1e-05)-differential privacy"])
    saved = json.loads((tmp_path / "history.json").read_text())
    assert saved["privacy"] == ["(1, 1e-05)-differential privacy"] and saved["rounds"][0]["skipped"]


@pytest.mark.slow
def test_four_processes_one_killed_while_it_works_give_the_simulations_model(tmp_path):
    experiment = dataclasses.replace(EXPERIMENT, clients=4)
    kill = Kill(client=2, round=1)
    found = deploy(experiment, tmp_path, DeployOptions(kill=kill))
    assert killed_mid_round(found, kill)
    assert [r["missing"] for r in found.rounds] == [[], []]
    history = experiment.simulate(alone=True)
    simulated = dict(flower.named({"large": history.large, "small": history.small}))
    assert max(np.abs(found.models[k] - v).max() for k, v in simulated.items()) < 1e-5

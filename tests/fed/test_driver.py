"""Rounds in an imperfect world: who replies, what is refused, and going on after an interruption."""

import dataclasses
import json
import logging

import fed_support as support
import jax
import numpy as np
import pytest

import fed
from fed import driver, rounds, sampling
from fed.aggregate import by_name
from fed.driver import Driver
from fed.sampling import Fleet
from fed.secure_aggregation import SecureConfig, SecureMean

CUT = support.splits()
SIZES = [40, 25, 60, 9, 30, 16]
PART = support.ragged(len(CUT.train), SIZES)
LOCAL = fed.LocalOptions(epochs=2, batch_size=8)
RUN = fed.RunOptions(rounds=3, local=LOCAL)
MODEL = support.mlp()


def fleet(count=40, seed=0):
    generator = np.random.default_rng(seed)
    steps = generator.integers(2, 20, count)
    return Fleet(steps * 8, steps, np.full(count, 1e8), np.full(count, 1e5))


def options(**more):
    return dataclasses.replace(RUN, sampling=fed.Sampling(**more))


def test_averaging_learns():
    found = fed.fedavg(MODEL, CUT, PART, dataclasses.replace(RUN, rounds=8))
    assert found.final["small_accuracy"] > 0.8
    assert found.series("loss")[-1] < 0.7 * found.series("loss")[0]
    assert found.rounds_to(0.5, "small_accuracy") <= 8
    assert found.rounds_to(1.1, "small_accuracy") is None
    assert "History(fedavg: 8 rounds" in repr(found)


def test_a_failed_quorum_skips_the_round_and_changes_nothing():
    run = dataclasses.replace(
        RUN, sampling=fed.Sampling(quorum=6), uploads=(fed.Attack((4,), "nan"),), rounds=2
    )
    found = fed.fedavg(MODEL, CUT, PART, run)
    begun = fed.fedavg(
        MODEL, CUT, PART, dataclasses.replace(run, uploads=(fed.Attack(tuple(range(6)), "zero"),))
    )
    assert [r["skipped"] for r in found.rounds] == [True, True]
    assert support.equal(found.small, begun.small)


def test_too_many_skipped_rounds_end_the_run():
    run = dataclasses.replace(
        RUN,
        rounds=9,
        most_skips=2,
        sampling=fed.Sampling(quorum=6),
        uploads=(fed.Attack((0,), "nan"),),
    )
    seen = []
    with pytest.raises(
        fed.QuorumLost, match="2 rounds .* because 5 usable replies came and the quorum is 6"
    ):
        fed.fedavg(MODEL, CUT, PART, run, on_round=seen.append)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("name", "needs"), [("krum", "Krum needs 4"), ("secure", "SecureMean needs 3")]
)
def test_too_few_replies_for_the_aggregator_skip_the_round(name, needs, caplog):
    run = dataclasses.replace(
        RUN,
        rounds=1,
        aggregator=by_name(name),
        uploads=(fed.Attack((0, 1, 2, 4), "nan"),),
        local=dataclasses.replace(LOCAL, epochs=1),
    )
    with caplog.at_level(logging.WARNING, logger="fed.driver"):
        found = fed.fedavg(MODEL, CUT, PART, run)
    assert found.rounds[0]["skipped"] and needs in found.rounds[0]["reason"]
    assert f"round 0 is skipped: 2 usable replies of {MODEL.name} came" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"uploads": (fed.Attack((6,)),)},
            "attacking clients must be among the 6, counted from 0; got 6",
        ),
        ({"aggregator": fed.Krum(4)}, "Krum needs 7 replies of an architecture; got at most 6"),
        (
            {"aggregator": by_name("secure"), "sampling": fed.Sampling(participation=0.3)},
            "SecureMean needs 3 replies of an architecture; got at most 2",
        ),
        (
            {"aggregator": SecureMean(SecureConfig(weight_limit=50))},
            "at most weight_limit=50 examples; client 2 has 60",
        ),
        (
            {"aggregator": SecureMean(SecureConfig(levels=2**30))},
            "at most 3 clients of an architecture in a round",
        ),
    ],
)
def test_what_would_fail_after_training_is_refused_before(changes, message):
    with pytest.raises(ValueError, match=message):
        fed.fedavg(MODEL, CUT, PART, dataclasses.replace(RUN, **changes))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("proxy", {"inputs": CUT.proxy.inputs[:0]}, "data.proxy must have examples; got none"),
        ("proxy", {"inputs": CUT.proxy.inputs[:, :3]}, r"has, \(6,\) float32; got \(3,\) float32"),
        ("proxy", {"inputs": CUT.proxy.inputs.astype(np.int32)}, r"got \(6,\) int32; convert"),
        ("test", {"classes": 5}, "data.test must have the classes of data.train, 4; got 5"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, change, message):
    wrong = dataclasses.replace(getattr(CUT, part), **change)
    with pytest.raises(ValueError, match=message):
        fed.fedavg(MODEL, dataclasses.replace(CUT, **{part: wrong}), PART, RUN)


def test_an_aggregator_without_effect_is_named(caplog):
    method = fed.Method([MODEL])
    method.name, method.averages = "mine", False
    run = dataclasses.replace(RUN, aggregator=fed.Median())
    with caplog.at_level(logging.WARNING, logger="fed.driver"):
        Driver(method, CUT, PART, run, None)
    assert "mine combines no updates: aggregator Median has no effect" in caplog.text


def test_a_bad_update_is_named_and_rejected_or_ends_the_run(caplog):
    run = dataclasses.replace(RUN, rounds=1, uploads=(fed.Attack((3,), "nan"),))
    with caplog.at_level(logging.WARNING, logger="fed.driver"):
        found = fed.fedavg(MODEL, CUT, PART, run)
    assert found.rounds[0]["rejected"] == [3]
    assert "update of client 3 in round 0 is not finite; rejected" in caplog.text
    with pytest.raises(fed.BadUpdate, match="update of client 3 in round 0 is not finite"):
        fed.fedavg(MODEL, CUT, PART, dataclasses.replace(run, bad_updates="raise"))


def test_an_empty_client_is_refused_by_number_unless_allowed():
    part = support.ragged(len(CUT.train), [*SIZES[:3], 0, *SIZES[4:]])
    with pytest.raises(ValueError, match="client 3 has none"):
        fed.fedavg(MODEL, CUT, part, RUN)
    found = fed.fedavg(MODEL, CUT, part, dataclasses.replace(RUN, rounds=1, empty_clients="skip"))
    assert found.rounds[0]["asked"] == 5


def test_clients_of_one_class_are_named(caplog):
    labels = CUT.train.labels
    first, rest = np.flatnonzero(labels == 1), np.flatnonzero(labels != 1)
    part = fed.Partition([rest[:50], first[:9], rest[50:]], len(labels), "mine")
    with caplog.at_level(logging.WARNING, logger="fed.driver"):
        fed.fedavg(MODEL, CUT, part, dataclasses.replace(RUN, rounds=1))
    assert "clients with one class only: 1" in caplog.text


def test_a_partition_of_other_data_is_refused():
    with pytest.raises(
        ValueError, match="partition must be of data.train, 180 examples; got one of 500"
    ):
        fed.fedavg(MODEL, CUT, support.ragged(500, SIZES), RUN)


def test_a_model_for_other_data_is_refused():
    other = fed.architectures.mlp((9,), (4,), support.CLASSES)
    with pytest.raises(ValueError, match=r"models must take \(6,\) and tell 4 classes"):
        fed.fedavg(other, CUT, PART, RUN)


def test_an_assignment_to_no_architecture_is_refused():
    with pytest.raises(
        ValueError, match="assignment must give each of 6 clients an architecture below 1"
    ):
        fed.fedavg(MODEL, CUT, PART, RUN, assignment=[0, 0, 0, 0, 0, 1])


def test_the_backend_may_be_left_to_a_measurement(caplog):
    run = dataclasses.replace(RUN, rounds=2)
    with caplog.at_level(logging.INFO, logger="fed.cohort"):
        auto = fed.fedavg(
            MODEL, CUT, PART, dataclasses.replace(run, engine=fed.EngineOptions("auto"))
        )
    assert len(caplog.records) == 1 and "vmap_s=" in caplog.text and "sequential_s=" in caplog.text
    plain = fed.fedavg(MODEL, CUT, PART, run)
    assert support.largest_difference(auto.small, plain.small) < 1e-5


# -- interruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["koala", pytest.param("fedavg", marks=pytest.mark.slow)])
def test_a_run_that_goes_on_gives_the_same_bits(method, tmp_path):
    large = fed.architectures.mlp((support.WIDTH,), (9,), support.CLASSES)
    step = fed.Distillation(steps=5, batch_size=16, features=0.1)
    how = fed.KoalaOptions(reverse=step, forward=step)
    run = dataclasses.replace(RUN, rounds=4, sampling=fed.Sampling(participation=0.5))

    def course(rounds, **more):
        given = dataclasses.replace(run, rounds=rounds)
        if method == "koala":
            return fed.koala(large, MODEL, CUT, PART, given, how, **more)
        return fed.fedavg(MODEL, CUT, PART, given, **more)

    whole = course(4)
    course(2, directory=tmp_path)
    seen = []
    rest = course(4, directory=tmp_path, on_round=seen.append)
    assert [r["round"] for r in seen] == [2, 3]
    assert support.equal(rest.small, whole.small) and support.equal(rest.large, whole.large)
    for a, b in zip(rest.rounds, whole.rounds, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]


def test_another_run_s_directory_is_refused(tmp_path):
    run = dataclasses.replace(RUN, rounds=1)
    fed.fedavg(MODEL, CUT, PART, run, directory=tmp_path)
    with pytest.raises(ValueError, match="holds a run with another options"):
        fed.fedavg(MODEL, CUT, PART, dataclasses.replace(run, seed=1), directory=tmp_path)


def test_other_data_assignments_and_shards_are_another_run():
    def identity(cut=CUT, part=PART, assignment=None):
        return Driver(fed.Method([MODEL, MODEL]), cut, part, RUN, assignment).identity()

    labels = CUT.train.labels.copy()
    labels[0] = (labels[0] + 1) % support.CLASSES
    other = dataclasses.replace(CUT, train=dataclasses.replace(CUT.train, labels=labels))
    moved = fed.Partition(np.split(PART.flat, [39, *PART.offsets[2:-1]]), PART.total, "ragged")
    usual = identity()
    for name, found in (
        ("data", identity(other)),
        ("assignment", identity(assignment=[0, 0, 0, 1, 1, 1])),
        ("partition", identity(part=moved)),
    ):
        assert [k for k in usual if found[k] != usual[k]] == [name]


def test_a_run_that_goes_on_keeps_the_measured_backend(tmp_path, monkeypatch):
    run = dataclasses.replace(RUN, rounds=1, engine=fed.EngineOptions("auto"))
    measured = dataclasses.replace(run.engine, backend="vmap")
    monkeypatch.setattr(driver, "choose", lambda *args: measured)
    fed.fedavg(MODEL, CUT, PART, run, directory=tmp_path)
    monkeypatch.delattr(driver, "choose")  # a second measurement might say otherwise
    found = fed.fedavg(MODEL, CUT, PART, dataclasses.replace(run, rounds=2), directory=tmp_path)
    assert [r["backends"] for r in found.rounds] == [["vmap"], ["vmap"]]


def test_skips_before_an_interruption_count(tmp_path):
    run = dataclasses.replace(
        RUN,
        rounds=1,
        most_skips=2,
        sampling=fed.Sampling(quorum=6),
        uploads=(fed.Attack((0,), "nan"),),
    )
    fed.fedavg(MODEL, CUT, PART, run, directory=tmp_path)
    seen = []
    with pytest.raises(fed.QuorumLost, match="2 rounds in a row"):
        more = {"directory": tmp_path, "on_round": seen.append}
        fed.fedavg(MODEL, CUT, PART, dataclasses.replace(run, rounds=9), **more)
    assert [r["round"] for r in seen] == [1]


# -- who takes part --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_samplers_ask_about_the_share_that_was_wanted(sampler):
    how = fed.Sampling(participation=0.25, sampler=sampler, speed_spread=1.0)
    plans = [sampling.plan(how, fleet(), 0, r) for r in range(60)]
    counts = [len(p.asked) for p in plans]
    assert abs(np.mean(counts) - 10) < 1.5
    assert (np.ptp(counts) == 0) == (sampler != "poisson")
    assert len({tuple(p.asked) for p in plans}) > 50
    assert all(np.array_equal(p.asked, np.sort(p.replied)) for p in plans)


@pytest.mark.parametrize(("sampler", "of"), [("size", "sizes"), ("capacity", "speeds")])
def test_samplers_favour_what_they_say(sampler, of):
    how = fed.Sampling(participation=0.25, sampler=sampler, speed_spread=1.0)
    clients = fleet()
    values = clients.sizes if of == "sizes" else clients.speeds(how, 0)
    asked = np.bincount(
        np.concatenate([sampling.plan(how, clients, 0, r).asked for r in range(300)]), minlength=40
    )
    largest, smallest = np.argsort(values)[-10:], np.argsort(values)[:10]
    assert asked[largest].sum() > 1.5 * asked[smallest].sum()


def test_a_plan_is_a_function_of_seed_and_round():
    how = fed.Sampling(participation=0.5, dropout=0.3)
    one, two = (sampling.plan(how, fleet(), 4, 7) for _ in range(2))
    assert np.array_equal(one.replied, two.replied) and np.array_equal(one.dropped, two.dropped)


def test_dropped_clients_do_not_reply():
    how = fed.Sampling(dropout=0.4)
    plans = [sampling.plan(how, fleet(), 0, r) for r in range(50)]
    assert abs(np.mean([len(p.dropped) for p in plans]) - 16) < 2
    for p in plans:
        assert sorted([*p.dropped, *p.replied]) == list(range(40))


def test_a_deadline_leaves_out_the_slow_or_takes_what_they_have():
    how = fed.Sampling(speed_spread=1.0, deadline_s=1.0)
    strict = sampling.plan(how, fleet(), 0, 0)
    lenient = sampling.plan(dataclasses.replace(how, partial_work=True), fleet(), 0, 0)
    assert 0 < len(strict.late) < 40 and strict.seconds == 1.0
    assert set(strict.replied) < set(lenient.replied)
    assert (strict.limits == fleet().steps[strict.replied]).all()
    cut = lenient.limits < fleet().steps[lenient.replied]
    assert cut.any() and set(lenient.replied[cut]) <= set(strict.late)
    assert (lenient.limits > 0).all()


def test_partial_work_reaches_the_training():
    speed, step = 1e3, fed.costs.step_flops(MODEL, LOCAL)
    found = fed.fedavg(
        MODEL,
        CUT,
        PART,
        options(
            deadline_s=4.5 * step / speed,  # four steps and a bit
            partial_work=True,
            device_gflops=speed / 1e9,
            bandwidth_mbps=1e9,
        ),
    )
    each = [min(4, 2 * -(-n // 8)) for n in SIZES]
    assert found.rounds[0]["client_flops"] == sum(each) * step
    assert found.rounds[0]["late"] == []


def test_asynchronous_replies_come_from_older_versions():
    how = fed.Sampling(participation=0.3, buffer=4, speed_spread=1.0)
    plans = sampling.asynchronous(how, fleet(), 0, 30)
    assert all(len(p.replied) == 4 for p in plans)
    ages = np.concatenate([p.ages for p in plans])
    assert ages.min() == 0 < ages.max() <= how.staleness
    assert all(p.seconds >= 0 for p in plans)
    assert not plans[0].ages.any()


def test_every_model_that_is_sent_is_counted():
    how = fed.Sampling(participation=0.3, buffer=4, speed_spread=2.0, dropout=0.3, staleness=1)
    plans = sampling.asynchronous(how, fleet(), 0, 30)
    ended = sum(len(p.replied) + len(p.dropped) + len(p.late) for p in plans)
    assert all(sum(len(getattr(p, name)) for p in plans) for name in ("dropped", "late"))
    assert sum(len(p.asked) for p in plans) == ended + 12  # who trains at the end


def test_late_replies_are_counted_as_sent():
    found = Driver(fed.Method([MODEL]), CUT, PART, options(deadline_s=1.0), None)
    plan = found.plan(0)
    plan = dataclasses.replace(plan, replied=plan.asked[:4], late=plan.asked[4:5])
    record = found._account(plan, [fed.cohort.join([])], 0)
    assert record["bytes_up"] == 5 * MODEL.nbytes and record["bytes_down"] == 6 * MODEL.nbytes


class Seen(fed.Method):
    """Averages, and notes every version and every reply as a model."""

    keep = True

    def __init__(self):
        super().__init__([MODEL])
        self.versions, self.members = [], []

    def update(self, state, replies, context, key):
        self.versions.append(state.small[0])
        found = rounds.members(state, replies, context)[0][0]
        self.members.append((found, replies[0].updates))
        return super().update(state, replies, context, key)


def test_late_replies_become_models_from_the_version_that_they_began_with():
    method = Seen()
    run = dataclasses.replace(options(buffer=2, speed_spread=1.0), rounds=5, evaluate_every=9)
    plans = Driver(method, CUT, PART, run, None).plans
    fed.run(method, CUT, PART, run)
    assert any(p.ages.any() for p in plans)
    for number, (plan, (found, updates)) in enumerate(zip(plans, method.members, strict=True)):
        begun = [method.versions[number - age] for age in plan.ages]
        for i, start in enumerate(begun):
            expected = jax.tree.map(lambda p, u, i=i: p + u[i], start, updates)
            assert support.equal(jax.tree.map(lambda x, i=i: x[i], found), expected)


def test_a_skipped_update_is_a_version_too():
    run = dataclasses.replace(options(buffer=2, staleness=2), rounds=9, evaluate_every=9)
    found = Driver(fed.Method([MODEL]), CUT, PART, run, None)
    state, _ = found.begin(None)
    older = [(jax.tree.map(lambda x, n=n: x + n, state.small[0]),) for n in range(3)]
    state = state.replace(past=tuple(older))
    nobody = fed.cohort.join([])
    after, record = found.finish(state, found.plan(0), [nobody], 0)
    assert record["skipped"] and support.equal(after.small, state.small)
    assert support.equal(after.past, (state.small, older[0], older[1]))


def test_an_asynchronous_run_learns():
    found = fed.fedavg(
        MODEL, CUT, PART, dataclasses.replace(options(buffer=3, speed_spread=1.0), rounds=10)
    )
    assert found.final["small_accuracy"] > 0.7
    assert all(r["replied"] == 3 for r in found.rounds)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampler": "best"}, "sampler must be one of uniform"),
        ({"participation": 0.0}, r"participation must lie in \(0, 1\]"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"buffer": 3, "deadline_s": 1.0}, "has no rounds, so deadline_s must be None"),
        ({"partial_work": True}, "partial_work needs a deadline_s"),
        ({"buffer": -1}, "buffer must be at least 0; got -1"),
        ({"buffer": 4, "staleness": -1}, "staleness must be at least 0; got -1"),
        ({"quorum": 0}, "quorum must be at least 1; got 0"),
        ({"buffer": 2, "quorum": 3}, "quorum must be at most buffer=2"),
        ({"bandwidth_mbps": 0.0}, "bandwidth_mbps must be positive; got 0"),
        ({"device_gflops": 0.0}, "device_gflops must be positive; got 0"),
        ({"device_gflops": float("nan")}, "device_gflops must be positive; got nan"),
        ({"speed_spread": -1.0}, "speed_spread must be at least 0; got -1"),
        ({"deadline_s": 0.0}, "deadline_s must be positive and finite, or None to wait; got 0"),
        ({"deadline_s": float("inf")}, "deadline_s must be positive and finite, .* got inf"),
    ],
)
def test_wrong_sampling_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fed.Sampling(**wrong)

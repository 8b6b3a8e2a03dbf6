"""Rounds in an imperfect world: who replies, what is refused, and going on after an interruption."""

import dataclasses
import json
import logging

import fed_support as support
import numpy as np
import pytest

import fed
from fed import sampling
from fed.sampling import Fleet

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
    with pytest.raises(fed.QuorumLost, match="quorum of 6 usable replies failed in 2 rounds"):
        fed.fedavg(MODEL, CUT, PART, run, on_round=seen.append)
    assert len(seen) == 2


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
    ],
)
def test_wrong_sampling_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fed.Sampling(**wrong)

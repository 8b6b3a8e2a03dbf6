"""The methods that KOALA is compared with, each in a few rounds."""

import dataclasses

import fed_support as support
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fed
from fed import baselines, report, rounds
from fed.aggregate import by_name
from fed.compare import METHODS, hides_too_much, run_method
from fed.koala import teach

CUT = support.splits()
SIZES = [40, 25, 60, 9, 30, 16]
PART = support.ragged(len(CUT.train), SIZES)
RUN = fed.RunOptions(rounds=3, local=fed.LocalOptions(epochs=3, batch_size=8), evaluate_every=3)
STEP = fed.Distillation(steps=15, batch_size=16, learning_rate=1e-2)
KOALA = fed.KoalaOptions(reverse=STEP, forward=STEP)


@pytest.fixture(scope="module")
def models():
    large = fed.architectures.mlp((support.WIDTH,), (16,), support.CLASSES)
    return large, [support.mlp(5), support.mlp(7)]


@pytest.fixture(scope="module")
def runs(models):
    return {
        name: run_method(name, CUT, PART, models, RUN, KOALA) for name in METHODS if name != "koala"
    }


def test_every_method_runs_and_beats_chance(runs):
    for name, history in runs.items():
        final = history.final
        best = max(final.get("large_accuracy", 0), final["small_accuracy"])
        assert best > 0.4, name
        assert 0 <= final["own_worst"] <= final["own_accuracy"] <= 1


def test_only_methods_with_a_server_model_report_one(runs):
    having = {name for name, history in runs.items() if "large_accuracy" in history.final}
    assert having == {"koala-homo", "koala-hete", "feddf", "fed-et"}


def test_nothing_is_sent_where_clients_are_alone(runs):
    assert runs["local-only"].total("bytes_up") == runs["local-only"].total("bytes_down") == 0


def test_fedmd_sends_logits_and_not_models(runs):
    logits = 80 * support.CLASSES * 4  # the whole proxy set is smaller than a subset
    assert runs["fedmd"].rounds[0]["bytes_up"] == len(SIZES) * logits


def test_the_large_model_s_clients_pay_for_it(runs, models):
    assert runs["fedavg-large"].rounds[0]["bytes_up"] == len(SIZES) * models[0].nbytes
    assert runs["fedavg-large"].total("client_flops") > runs["fedavg-small"].total("client_flops")


def test_one_place_is_one_client_with_everything(runs):
    assert runs["centralised"].rounds[0]["asked"] == 1
    assert runs["centralised"].final["small_accuracy"] > 0.8


def test_one_place_has_no_attackers_and_nothing_to_aggregate(runs, models):
    run = dataclasses.replace(RUN, uploads=(fed.Attack((0,), "sign", 10.0),), aggregator=fed.Krum())
    found = run_method("centralised", CUT, PART, models, run, KOALA)
    assert support.equal(found.small, runs["centralised"].small)


@pytest.mark.parametrize("aggregator", ["secure", "private:1:1:3"])
def test_who_reads_members_refuses_an_aggregator_that_hides_them(models, aggregator):
    run = dataclasses.replace(RUN, aggregator=by_name(aggregator))
    for name in METHODS:
        if hides_too_much(name, run, 2):
            with pytest.raises(ValueError, match="hides"):
                run_method(name, CUT, PART, models, run, KOALA)
    hidden = [name for name in METHODS if hides_too_much(name, run, 1)]
    assert hidden == ["koala-hete", "feddf", "fedmd", "fed-et"]
    assert not any(hides_too_much(name, RUN, 2) for name in METHODS)


def test_chunks_of_personal_models_are_taught_like_all_at_once(models):
    model = models[1][0]
    stacked = jax.vmap(model.init)(jax.random.split(jax.random.key(0), 6))
    inputs = jnp.asarray(CUT.proxy.inputs[:32])
    soft = jax.nn.softmax(model.apply(model.init(jax.random.key(9)), inputs))
    order = fed.distill.orders(jax.random.key(1), 32, 3, 16)
    lesson, rows = fed.distill.Lesson(inputs, soft), np.array([0, 2, 3, 4, 5])
    all_, cut = (
        teach(stacked, None, lesson, order, model, STEP, rows, chunk)[0] for chunk in (64, 2)
    )
    assert support.largest_difference(all_, cut) < 1e-6
    assert support.largest_difference(all_, stacked) > 1e-3
    seen = []

    def note(params):
        seen.append(jax.tree.leaves(params)[0].shape[0])
        return params

    rounds.in_chunks(note, stacked, rows, 2)
    assert seen == [2, 2, 1]


def test_local_models_differ_and_are_worse_than_shared_ones(runs):
    assert runs["local-only"].final["small_accuracy"] < runs["fedavg-small"].final["small_accuracy"]


@pytest.mark.slow
def test_fedprox_stays_nearer_to_the_start(models):
    one = dataclasses.replace(RUN, rounds=1)
    plain = fed.fedavg(models[1][0], CUT, PART, one)
    near = fed.fedprox(models[1][0], CUT, PART, one, mu=10.0)
    far = fed.fedprox(models[1][0], CUT, PART, one, mu=0.0)
    assert support.equal(far.small, plain.small)
    assert support.largest_difference(near.small, plain.small) > 1e-3


def test_fed_et_shares_heads_where_they_fit(models):
    large, _ = models
    fits, not_ = support.mlp(16), support.mlp(5)
    et = baselines.EtOptions(dataclasses.replace(STEP, temperature=1.0, consensus=0.05))
    found = fed.fedet(large, [fits, not_], CUT, PART, dataclasses.replace(RUN, rounds=1), et)
    assert support.equal(found.small[0]["head"], found.large["head"])
    assert found.small[1]["head"]["kernel"].shape == (5, support.CLASSES)


@pytest.mark.slow
def test_feddf_moves_every_architecture_towards_the_ensemble(models):
    one = dataclasses.replace(RUN, rounds=1)
    averaged = fed.fedavg(models[1], CUT, PART, one)
    none = baselines.DfOptions(dataclasses.replace(STEP, steps=0))
    some = baselines.DfOptions(STEP)
    still = fed.feddf(models[1], CUT, PART, one, none)
    moved = fed.feddf(models[1], CUT, PART, one, some)
    assert support.equal(still.small, averaged.small)
    assert support.largest_difference(moved.small, averaged.small) > 1e-3


def test_reports_have_rows_a_table_and_a_plot(runs, models, tmp_path):
    given = {name: [history, history] for name, history in runs.items()}
    rows = report.report_rows(given, target=0.5)
    assert {"name", "value", "unit"} <= set(rows[0])
    named = {r["name"]: r for r in rows}
    assert named["koala-homo, large_accuracy"]["deviation"] == 0
    assert named["fedavg-large, bytes_up"]["value"] == 3 * 6 * models[0].nbytes
    assert named["koala-homo, rounds to 0.5"]["unit"] == "rounds"
    assert report.table(given, "t").row_count == len(runs)
    assert report.plot(given, tmp_path / "a.png").stat().st_size > 10_000
    saved = report.pair_savings(models[0], models[1], RUN.local)
    mean = np.mean([m.nbytes for m in models[1]])
    assert saved["storage"] == pytest.approx(1 - mean / models[0].nbytes)


@pytest.mark.parametrize("name", ["fedsgd", "koala-both"])
def test_an_unknown_method_is_refused(models, name):
    with pytest.raises(ValueError, match="method must be one of koala"):
        run_method(name, CUT, PART, models, RUN, KOALA)


def test_fedmd_needs_proxy_inputs():
    with pytest.raises(ValueError, match="subset must be at least 1; got 0"):
        baselines.MdOptions(subset=0)

"""KOALA's invariants (spec 1.4), and what each phase may touch."""

import dataclasses

import fed_support as support
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fed
from fed.aggregate import Mean
from fed.driver import Driver
from fed.koala import Koala

CUT = support.splits()
PART = support.ragged(len(CUT.train), [40, 25, 60, 9, 30, 16])
RUN = fed.RunOptions(rounds=2, local=fed.LocalOptions(epochs=2, batch_size=8), evaluate_every=9)
REVERSE = fed.Distillation(steps=12, batch_size=16, learning_rate=1e-2)
FORWARD = fed.Distillation(steps=6, batch_size=16, features=0.1)
NONE = fed.Distillation(steps=0)
KOALA = fed.KoalaOptions(reverse=REVERSE, forward=FORWARD)


@pytest.fixture(scope="module")
def large():
    return fed.architectures.mlp((support.WIDTH,), (16, 16), support.CLASSES)


@pytest.fixture(scope="module")
def small():
    return [support.mlp(5), support.mlp(7)]


def koala(large, small, run=RUN, part=PART, **changes):
    return fed.koala(large, small, CUT, part, run, dataclasses.replace(KOALA, **changes))


@pytest.fixture(scope="module")
def homo(large, small):
    return koala(large, small[0])


def test_without_distillation_it_is_plain_averaging_bit_for_bit(large, small):
    found = koala(large, small[0], reverse=NONE, forward=NONE)
    assert support.equal(found.small, fed.fedavg(small[0], CUT, PART, RUN).small)


def test_without_reverse_steps_the_large_model_is_untouched(large, small):
    once = koala(large, small[0], reverse=NONE)
    never = koala(large, small[0], dataclasses.replace(RUN, rounds=1), reverse=NONE, forward=NONE)
    assert support.equal(once.large, never.large)


def test_hete_with_one_architecture_and_size_weights_is_homo_exactly(large, small, homo):
    hete = koala(large, small[:1], mode="hete", merge=fed.Merge("size"))
    assert support.equal(hete.large, homo.large) and support.equal(hete.small, homo.small)


def test_renaming_clients_changes_sums_only(large, small):
    """Full batches in fixed order, so that a client's number decides nothing but its place in the sum."""
    run = dataclasses.replace(RUN, rounds=1, local=fed.LocalOptions(epochs=1, batch_size=64))
    order = [3, 1, 5, 0, 2, 4]
    other = fed.Partition([PART[k] for k in order], PART.total, "renamed")
    one, two = (koala(large, small[0], run, part) for part in (PART, other))
    assert support.largest_difference(one.small, two.small) < 1e-5
    assert support.largest_difference(one.large, two.large) < 1e-4  # Adam divides by small moments


def test_a_client_that_never_replies_influences_nothing(large, small):
    """Its data are replaced by nonsense: every bit stays."""
    never = 2
    spoiled = CUT.train.inputs.copy()
    spoiled[PART[never]] = 1e3
    other = dataclasses.replace(CUT, train=dataclasses.replace(CUT.train, inputs=spoiled))
    run = dataclasses.replace(RUN, uploads=(fed.Attack((never,), "nan"),))
    options = dataclasses.replace(KOALA, mode="hete")
    one, two = (fed.koala(large, small, cut, PART, run, options) for cut in (CUT, other))
    assert one.rounds[0]["rejected"] == [never]
    assert support.equal(one.large, two.large) and support.equal(one.small, two.small)


@pytest.mark.slow
def test_an_architecture_without_any_reply_has_no_say(large, small):
    run = dataclasses.replace(RUN, rounds=1, uploads=(fed.Attack((1, 3, 5), "nan"),))
    both = koala(large, small, run, mode="hete", merge=fed.Merge("uniform"))
    alone = fed.koala(
        large,
        small[:1],
        CUT,
        PART,
        dataclasses.replace(run, uploads=(fed.Attack((1, 3, 5), "nan"),)),
        dataclasses.replace(KOALA, mode="hete", merge=fed.Merge("uniform")),
    )
    assert support.largest_difference(both.large, alone.large) < 1e-5


@pytest.mark.parametrize("what", ["head", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_server_trains_only_what_it_was_told(large, small, what):
    found = koala(large, small[0], trainable=fed.Trainable(what, rank=2))
    untouched = koala(
        large, small[0], dataclasses.replace(RUN, rounds=1), reverse=NONE, forward=NONE
    )
    moved = {
        name: support.largest_difference(found.large[name], untouched.large[name])
        for name in ("layers", "head")
    }
    if what == "head":
        assert moved["layers"] == 0 and moved["head"] > 0
    else:
        assert moved["layers"] > 0
        biases = [p["bias"] for p in (found.large["head"], untouched.large["head"])]
        assert np.array_equal(*biases)


def test_the_large_model_learns_from_clients_that_it_never_sees(large, small):
    run = dataclasses.replace(RUN, rounds=6)
    options = {"reverse": dataclasses.replace(REVERSE, steps=40)}
    for mode, models in (("homo", small[:1]), ("hete", small)):
        found = koala(large, models if mode == "hete" else models[0], run, mode=mode, **options)
        assert found.final["large_accuracy"] > 0.8
        assert found.final["large_accuracy"] > found.final["small_accuracy"] - 0.1


@pytest.mark.parametrize("personal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_single_clients_can_be_the_ensemble(large, small, personal):
    found = koala(large, small, mode="hete", members="clients", personal=personal)
    assert np.isfinite(found.final["large_accuracy"])
    if personal:
        members = [jax.tree.leaves(p)[0].shape[0] for p in found.personal]
        assert members == [3, 3]
        first = jax.tree.map(lambda x: x[0], found.personal[0])
        second = jax.tree.map(lambda x: x[1], found.personal[0])
        assert support.largest_difference(first, second) > 1e-3


def test_the_server_never_holds_labels_of_the_proxy_set(large, small):
    driver = Driver(Koala(large, small[:1], KOALA), CUT, PART, RUN, None)
    arrays = [x for x in vars(driver.context).values() if isinstance(x, jax.Array)]
    assert [x.shape for x in arrays] == [CUT.proxy.inputs.shape]


@pytest.mark.misuse
def test_a_labelled_proxy_set_is_refused(large, small):
    wrong = dataclasses.replace(CUT, proxy=CUT.validation)
    with pytest.raises(TypeError, match="no labels to read; got Dataset"):
        fed.koala(large, small[0], wrong, PART, RUN, KOALA)


def test_hete_refuses_an_aggregator_that_hides_members(large, small):
    run = dataclasses.replace(RUN, aggregator=Mean(individual=False))
    with pytest.raises(ValueError, match="secure aggregation goes with mode='homo'"):
        koala(large, small, run, mode="hete")


def test_homo_needs_one_architecture(large, small):
    with pytest.raises(ValueError, match="needs one client architecture; got 2"):
        koala(large, small, mode="homo")


def test_models_of_different_tasks_are_refused(large):
    other = fed.architectures.mlp((support.WIDTH,), (4,), support.CLASSES + 1)
    with pytest.raises(
        ValueError, match=r"client model 0 must have the outputs of the server's model"
    ):
        koala(large, other)


def test_bytes_are_the_small_models_both_ways(homo, small):
    size = small[0].nbytes
    assert size == 4 * small[0].parameters
    assert homo.rounds[0]["bytes_up"] == homo.rounds[0]["bytes_down"] == 6 * size


def test_savings_come_from_the_pair_itself(large, small):
    saved = fed.savings(fed.measure(small[0], RUN.local), fed.measure(large, RUN.local))
    assert saved["storage"] == 1 - small[0].nbytes / large.nbytes
    # A training step's products: 2 * parameters forward, twice that backward, less the first layer's input gradient.
    assert saved["flops"] == pytest.approx(1 - small[0].parameters / large.parameters, abs=0.12)
    assert 0 < saved["peak_memory"] < 1


@pytest.mark.slow
def test_features_are_matched_through_a_projector(large, small, homo):
    plain = koala(large, small[0], forward=dataclasses.replace(FORWARD, features=0.0))
    assert support.largest_difference(plain.small, homo.small) > 1e-5


def test_proxy_inputs_may_be_augmented(large, small):
    found = koala(large, small[0], augment="mix", copies=3)
    assert np.isfinite(found.final["large_accuracy"])
    with pytest.raises(ValueError, match="augment='shift' shifts images"):
        koala(large, small[0], augment="shift", copies=2)


def test_a_user_s_pair_of_functions_is_a_client(large):
    def init(key):
        return {"head": 0.1 * jax.random.normal(key, (support.WIDTH, support.CLASSES))}

    found = koala(large, (init, lambda p, x: x @ p["head"]))
    assert found.final["small_accuracy"] > 0.5
    assert jnp.isfinite(found.final["reverse_loss"])

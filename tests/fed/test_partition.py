"""Partitions: nobody shares, everything is dealt, and the skew is what was asked for."""

import numpy as np
import pytest

import fed
from fed import partition

LABELS = np.random.default_rng(0).integers(0, 10, 2000).astype(np.int32)

RULES = {
    "iid": lambda seed: partition.iid(LABELS, 20, seed),
    "dirichlet": lambda seed: partition.dirichlet(LABELS, 20, 0.5, seed),
    "balanced": lambda seed: partition.dirichlet(LABELS, 20, 0.5, seed, balance=True),
    "shards": lambda seed: partition.shards(LABELS, 20, 2, seed),
    "quantity": lambda seed: partition.quantity(LABELS, 20, seed),
    "zipf": lambda seed: partition.quantity(2000, 20, seed, law="zipf"),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_example_has_exactly_one_owner(rule):
    made = RULES[rule](3)
    assert len(made) == 20
    assert sorted(np.concatenate(list(made)).tolist()) == list(range(2000))


@pytest.mark.parametrize("rule", RULES)
def test_a_seed_gives_one_partition(rule):
    first, again, other = RULES[rule](1), RULES[rule](1), RULES[rule](2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_smaller_alpha_is_further_from_the_whole():
    distances = [
        partition.dirichlet(LABELS, 20, alpha, 0).statistics(LABELS).distance
        for alpha in (0.1, 0.5, 5.0, 500.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.6 and distances[-1] < 0.1


def test_iid_sizes_differ_by_one_at_most():
    assert np.ptp(partition.iid(2001, 20, 0).sizes) == 1


def test_shards_hold_few_classes():
    histogram = RULES["shards"](0).statistics(LABELS).histogram
    assert (histogram > 0).sum(1).max() <= 4  # two shards, each across one border at most
    assert (histogram > 0).sum(1).mean() < 3


def test_balancing_takes_from_the_large():
    skewed = partition.dirichlet(LABELS, 20, 0.1, 5).sizes
    balanced = partition.dirichlet(LABELS, 20, 0.1, 5, balance=True).sizes
    assert balanced.max() < skewed.max()


def test_quantity_skew_leaves_nobody_below_the_minimum():
    sizes = partition.quantity(2000, 20, 0, spread=2.0, minimum=7).sizes
    assert sizes.min() >= 7 and sizes.max() > 5 * np.median(sizes)


def test_natural_clients_are_the_owners():
    owners = np.array([2, 2, 0, 0, 0, 5])
    made = partition.natural(owners, minimum=2)
    assert [part.tolist() for part in made] == [[2, 3, 4], [0, 1]]
    assert [len(part) for part in partition.natural(owners, clients=1)] == [3]


def test_a_minimum_that_no_draw_reaches_is_refused():
    with pytest.raises(ValueError, match=r"every client must have minimum=90 .* the smallest"):
        partition.dirichlet(LABELS, 20, 0.1, 0, minimum=90)


def test_a_shared_example_is_refused_with_its_owners():
    with pytest.raises(ValueError, match=r"one client; 4 belongs to \[0, 2\]"):
        fed.Partition([np.array([4, 1]), np.array([2]), np.array([4])], 5, "mine")


def test_an_index_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 5\)"):
        fed.Partition([np.array([5])], 5, "mine")


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be positive"):
        partition.dirichlet(LABELS, 20, alpha, 0)


def test_statistics_name_empty_and_single_class_clients():
    labels = np.array([0, 0, 1, 1], np.int32)
    made = fed.Partition([np.array([0, 1]), np.array([2, 3]), np.array([], int)], 4, "mine")
    found = made.statistics(labels)
    assert found.distance == 0.5 and found.classes_held == 1.0
    assert "single-class 2, empty 1" in str(found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: partition.quantity(20, 4, 0, minimum=-1),
            r"minimum x clients must lie in \[0, 20\]",
        ),
        (
            lambda: partition.quantity(20, 4, 0, spread=-1.0),
            "spread must be finite and not negative",
        ),
        (lambda: partition.quantity(20, 4, 0, law="even"), "law must be lognormal or zipf"),
        (lambda: partition.natural(np.array([1, 2]), clients=0), "clients must be at least 1"),
        (lambda: partition.shards(LABELS, 20, 0, 0), "clients x classes_per_client must lie"),
    ],
)
def test_impossible_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

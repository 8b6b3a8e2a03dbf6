"""Who has which part of the training state: pure."""

import numpy as np
import pytest

from jaxmoe.train.elastic import parts, peers


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("experts", [0, 6, 8])
def test_a_mesh_splits_the_experts_evenly_and_uses_every_rank(ranks, experts):
    shape = parts.mesh_shape(ranks, experts)
    assert shape.data * shape.expert == ranks
    for row in range(shape.data):
        places = range(row * shape.expert, (row + 1) * shape.expert)
        held = [e for place in places for e in parts.own_experts(place, shape, experts)]
        assert held == [*range(experts)]


def test_what_communicates_is_the_mesh_its_rows_and_its_columns():
    assert parts.groups("abc", parts.MeshShape(3, 1)) == [("a", "b", "c")]
    assert parts.groups("a", parts.MeshShape(1, 1)) == []
    assert sorted(parts.groups("abcd", parts.MeshShape(2, 2))) == [
        ("a", "b"), ("a", "b", "c", "d"), ("a", "c"), ("b", "d"), ("c", "d"),
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("experts", [0, 6, 8])
def test_any_one_rank_may_be_lost(ranks, experts):
    shape = parts.mesh_shape(ranks, experts)
    kept = [set(parts.kept_experts(place, shape, experts)) for place in range(ranks)]
    for lost in range(ranks):
        rest = [k for place, k in enumerate(kept) if place != lost]
        assert set().union(*rest) == {*range(experts)}
        inventories = {place: {7: frozenset(k), 5: frozenset()} for place, k in enumerate(rest)}
        assert parts.restorable(inventories, experts) == 7


def test_the_latest_step_of_which_everything_is_there_is_restored():
    inventories = {
        0: {10: frozenset({0, 1}), 20: frozenset({0})},
        1: {10: frozenset({2}), 20: frozenset({2})},
    }
    assert parts.restorable(inventories, 3) == 10
    assert parts.restorable({1: inventories[1]}, 3) is None


def test_parts_put_together_are_what_was_taken_apart(rng):
    axes = [None, 1, 0]
    leaves = [rng.normal(size=shape) for shape in ((3,), (2, 4, 5), (4,))]
    whole = parts.take_apart(leaves, axes, range(4))
    for got, expected in zip(parts.put_together(whole, axes, range(4)), leaves, strict=True):
        np.testing.assert_array_equal(got, expected)
    middle = parts.put_together(whole, axes, [1, 2])
    np.testing.assert_array_equal(middle[1], leaves[1][:, 1:3])
    np.testing.assert_array_equal(middle[2], leaves[2][1:3])
    leaves[0][0] = 99  # copies: the arrays may be donated
    assert parts.put_together(whole, axes, range(4))[0][0] != 99


def test_sources_are_whoever_has_it_and_has_been_asked_least():
    held = {"a": frozenset({0, 1}), "b": frozenset({0, 1})}
    plans = parts.plan_sources({"a": [0, 1], "c": [0, 1]}, held)
    assert plans["a"] == parts.Sources(None, {})
    assert plans["c"].common in held
    assert sorted(plans["c"].experts.items()) == [("a", (0,)), ("b", (1,))]


def test_a_part_is_fetched_from_another_process_or_refused(tmp_path):
    store = peers.Store()
    with peers.serve(store, tmp_path, "a", b"key"):
        part = parts.Part((np.arange(3),), {4: (np.ones(2),), 5: (np.zeros(2),)})
        store.put(10, part)
        got = peers.fetch(tmp_path, "a", b"key", 10, [5], common=False)
        assert got.common is None and set(got.experts) == {5}
        with pytest.raises(ConnectionError, match="does not have the asked part of step 10"):
            peers.fetch(tmp_path, "a", b"key", 10, [6], common=True)
        with pytest.raises(TimeoutError, match="step 11"):
            peers.fetch(tmp_path, "a", b"key", 11, [5], common=True, timeout_s=0.01)
        with pytest.raises(ConnectionError):
            peers.fetch(tmp_path, "a", b"another key", 10, [5], common=True)

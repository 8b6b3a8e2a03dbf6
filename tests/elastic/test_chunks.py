"""Rebalancing in chunks: valid at every point, small steps, and it arrives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.elastic import CoverageLost, Membership, Placement, chunks, rebalance


@st.composite
def pairs(draw):
    """Two placements that cover every expert, with any slots empty or redundant."""
    experts, extra, layers = (
        draw(st.integers(2, 7)),
        draw(st.integers(0, 4)),
        draw(st.integers(1, 2)),
    )
    slots = experts + extra
    others = st.lists(st.integers(-1, experts - 1), min_size=extra, max_size=extra)

    def table():
        rows = [[*range(experts), *draw(others)] for _ in range(layers)]
        return np.asarray([draw(st.permutations(row)) for row in rows])

    return table(), table(), experts, slots


def walk(old, new, most):
    """Checks every step of the way; returns the number of changes in all."""
    now, changes = old, 0
    for placement in chunks(old, new, most):
        placement.check()
        changed = np.count_nonzero(placement.slot_expert != now.slot_expert)
        assert 1 <= changed <= most
        now, changes = placement, changes + changed
    assert now == new
    return changes


@given(pairs(), st.integers(2, 5))
def test_every_chunk_is_small_and_covers_and_the_last_is_the_goal(pair, most):
    old, new, experts, slots = pair
    old, new = Placement(old, experts, 1), Placement(new, experts, 1)
    difference = np.count_nonzero(old.slot_expert != new.slot_expert)
    changes = walk(old, new, most)
    assert difference <= changes <= 2 * difference
    if most >= slots:
        assert changes == difference


@given(pairs())
def test_single_moves_go_through_redundant_slots(pair):
    old, new, experts, slots = pair
    old, new = Placement(old, experts, 1), Placement(new, experts, 1)
    try:
        walk(old, new, 1)
    except ValueError as error:
        assert slots == experts and "max_moves must be at least 2" in str(error)


def test_a_long_cycle_is_cut():
    old = Placement(np.asarray([[0, 1, 2, 3, 4, 5]]), 6, 3)
    new = Placement(np.asarray([[5, 0, 1, 2, 3, 4]]), 6, 3)
    assert walk(old, new, 6) == 6 and len(list(chunks(old, new, 6))) == 1
    assert walk(old, new, 2) == 10  # five exchanges of two
    with pytest.raises(ValueError, match="experts of layer 0 trade places and it has no redundant"):
        chunks(old, new, 1)


def test_a_rebalance_after_a_loss_goes_in_chunks():
    membership = Membership.initial(6).without([2])
    generator = np.random.default_rng(0)
    old, new = (rebalance(generator.lognormal(0, 1, (5, 16)), membership, 4) for _ in range(2))
    assert walk(old, new, 7) >= np.count_nonzero(old.slot_expert != new.slot_expert) > 30
    assert list(chunks(old, old, 7)) == []


def test_chunks_refuse_what_has_no_valid_way():
    whole, partial = Placement(np.asarray([[0, 1]]), 2, 1), Placement(np.asarray([[0, 0]]), 2, 1)
    with pytest.raises(CoverageLost, match=r"\(layer 0, expert 1\) has none"):
        chunks(whole, partial, 4)
    with pytest.raises(CoverageLost, match=r"\(layer 0, expert 1\) has none"):
        chunks(partial, whole, 4)
    with pytest.raises(ValueError, match="max_moves must be >= 1; got 0"):
        chunks(whole, whole, 0)
    with pytest.raises(ValueError, match="new must be a placement like"):
        chunks(whole, Placement(np.asarray([[0, 1]]), 2, 2), 4)

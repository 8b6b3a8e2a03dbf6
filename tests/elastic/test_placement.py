"""EPLB against its reference vectors and a scalar version; placements that keep copies apart."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.elastic import CoverageLost, Membership, Placement, eplb, rebalance
from jaxmoe.moe.tables import slots_of

LOADS = np.asarray(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_hierarchical_eplb_gives_the_published_vector():
    # The example in EPLB's README.
    np.testing.assert_array_equal(
        eplb(LOADS, 16, groups=4, nodes=2, ranks=8),
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ],
    )


@pytest.mark.parametrize("more", [{}, {"groups": 3, "nodes": 2}])
def test_global_eplb_gives_the_second_vector(more):
    # From an independent port; three groups don't divide between two nodes, which means global.
    np.testing.assert_array_equal(
        eplb(LOADS, 16, ranks=8, **more),
        [
            [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
            [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
        ],
    )


def scalar_pack(weights, bins):
    size = len(weights) // bins
    if size == 1:
        return [(i, 0) for i in range(bins)]
    content, where = [[] for _ in range(bins)], [None] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        roomy = [b for b in range(bins) if len(content[b]) < size]
        target = min(roomy, key=lambda b: (sum(weights[i] for i in content[b]), b))
        where[item] = (target, len(content[target]))
        content[target].append(item)
    return where


def scalar_eplb(load, slots, groups, nodes, ranks):
    size, per_node = len(load) // groups, groups // nodes
    group_load = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    where = scalar_pack(group_load, nodes)
    result = [None] * slots
    for node in range(nodes):
        chosen = sorted((p, g) for g, (n, p) in enumerate(where) if n == node)
        experts = [g * size + i for _, g in chosen for i in range(size)]
        assert len(experts) == per_node * size
        copies, count = list(experts), {e: 1 for e in experts}
        while len(copies) < slots // nodes:
            hot = max(experts, key=lambda e: (load[e] / count[e], -experts.index(e)))
            count[hot] += 1
            copies.append(hot)
        local_ranks = ranks // nodes
        spots = scalar_pack([load[e] / count[e] for e in copies], local_ranks)
        for expert, (rank, position) in zip(copies, spots, strict=True):
            result[(node * local_ranks + rank) * (slots // ranks) + position] = expert
    return result


@given(
    st.sampled_from([(8, 16, 4, 2, 4), (6, 12, 1, 1, 3), (12, 16, 6, 2, 8), (6, 6, 2, 2, 2)]),
    st.integers(0, 2**32 - 1),
)
def test_eplb_equals_the_scalar_algorithm_layer_by_layer(shape, seed):
    experts, slots, groups, nodes, ranks = shape
    # Multiples of a power of two: sums are exact in any order, so ties are ties.
    load = np.random.default_rng(seed).integers(0, 6, (3, experts)).astype(float)
    got = eplb(load, slots, groups=groups, nodes=nodes, ranks=ranks)
    assert got.tolist() == [scalar_eplb(row.tolist(), slots, groups, nodes, ranks) for row in load]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"slots": 16, "ranks": 5}, r"ranks must divide slots \(16\); got 5"),
        ({"slots": 16, "groups": 5}, r"groups must divide experts \(12\); got 5"),
        (
            {"slots": 15, "groups": 4, "nodes": 2, "ranks": 3},
            r"nodes must divide ranks \(3\); got 2",
        ),
        ({"slots": 8}, "slots must be at least the 12 experts; got 8"),
    ],
)
def test_eplb_refuses_numbers_that_do_not_divide(arguments, message):
    with pytest.raises(ValueError, match=message):
        eplb(LOADS, **arguments)


@st.composite
def clusters(draw):
    """Loads, which ranks are active, and slots per rank, enough for all experts."""
    experts, capacity = draw(st.integers(2, 9)), draw(st.integers(1, 6))
    active = draw(st.lists(st.booleans(), min_size=capacity, max_size=capacity).filter(any))
    least = -(-experts // sum(active))
    slots = draw(st.integers(least, least + 4))
    values = st.lists(st.integers(0, 50), min_size=experts, max_size=experts)
    load = draw(st.lists(values, min_size=1, max_size=3))
    return np.asarray(load), tuple(active), slots


def membership_of(active):
    return Membership(3, active, tuple(int(on) - 1 for on in active))


@given(clusters(), st.integers(1, 4))
def test_rebalance_covers_with_copies_apart_and_fills_the_slots(cluster, floor):
    load, active, slots = cluster
    membership = membership_of(active)
    placement = rebalance(load, membership, slots, floor=floor)
    placement.check(membership)
    assert placement.holders.max() == 1
    ranks, experts = len(membership.ranks), load.shape[1]
    assert placement.min_copies >= min(floor, ranks, ranks * slots // experts)
    assert (placement.copies.sum(-1) == ranks * min(slots, experts)).all()
    assert rebalance(load.copy(), membership, slots, floor=floor).digest == placement.digest


@given(clusters())
def test_inverse_tables_are_exact(cluster):
    load, active, slots = cluster
    membership = membership_of(active)
    placement = rebalance(load, membership, slots)
    inverse, copies = placement.expert_slots(), placement.copies
    for layer in range(placement.layers):
        seen = set()
        for expert in range(placement.experts):
            row = inverse[layer, expert].tolist()
            listed = row[: copies[layer, expert]]
            assert row[len(listed) :] == [-1] * (len(row) - len(listed))
            assert listed == np.flatnonzero(placement.slot_expert[layer] == expert).tolist()
            seen.update(listed)
        assert seen == set(np.flatnonzero(placement.slot_expert[layer] >= 0).tolist())
    expected = np.zeros_like(placement.holders)
    for layer, slot in np.argwhere(placement.slot_expert >= 0):
        expected[layer, slot // slots, placement.slot_expert[layer, slot]] += 1
    np.testing.assert_array_equal(placement.holders, expected)


@pytest.mark.parametrize("order", [(0, 2, 3), (3, 0, 2)])
def test_tables_lead_every_token_to_its_expert_on_a_mesh_in_any_order(order):
    membership = Membership.initial(4).without([1])
    load = np.random.default_rng(0).integers(1, 50, (2, 6))
    placement = rebalance(load, membership, 3)
    tables = placement.tables(order)
    assert tables.expert_slots.shape == (2, 6, 4)  # 9 slots, 5 of them for other experts
    ids = jnp.tile(jnp.arange(6, dtype=jnp.int32), (5, 1))
    for layer in range(2):
        chosen = np.asarray(slots_of(jax.tree.map(lambda x, i=layer: x[i], tables), ids))
        physical = np.asarray(order)[chosen // 3] * 3 + chosen % 3
        np.testing.assert_array_equal(placement.slot_expert[layer][physical], ids)
        # Every copy takes its turn.
        assert len(np.unique(physical)) == 9


def test_a_floor_saves_every_single_loss_and_load_stays_even():
    load = np.random.default_rng(0).lognormal(0, 1, (4, 32))
    membership = Membership.initial(8)
    safe = rebalance(load, membership, 8, floor=2)
    fast = rebalance(load, membership, 8, floor=1)

    def peak(placement):
        loads = placement.rank_load(load)
        return (loads.max(-1) / loads.mean(-1)).mean()

    assert max(peak(fast), peak(safe)) < 1.1
    for rank in range(8):
        assert safe.without([rank]).min_copies == 1
    assert min(fast.without([rank]).min_copies for rank in range(8)) == 0


def test_packing_makes_room_when_only_ranks_that_hold_the_expert_have_slots_left():
    # Heaviest first to the lightest rank: 60 to ranks 0 and 1, 50 to 2 and 0; then three experts fill 1 and 2, and the last
    # one finds both free slots on rank 0.
    stuck = [[60, 50, 9, 9, 9, 9]]
    load = np.concatenate([stuck, np.random.default_rng(0).integers(1, 50, (200, 6))])
    placement = rebalance(load, Membership.initial(3), 4)
    assert placement.holders.max() == 1 and (placement.copies == 2).all()
    # What moves over must not be there already: the lightest experts are, here.
    load = np.random.default_rng(0).integers(0, 20, (500, 8))
    placement = rebalance(load, Membership.initial(4), 6, floor=3)
    assert placement.holders.max() == 1 and (placement.copies == 3).all()
    placement = rebalance(np.asarray([[0, 1, 0, 0, 0]]), Membership.initial(3), 4)
    assert placement.holders.max() == 1 and placement.copies.sum() == 12


def test_near_keeps_what_it_can_and_changes_no_rank_load():
    load = np.random.default_rng(1).lognormal(0, 1, (3, 16))
    membership = Membership.initial(4)
    old = rebalance(load, membership, 6)
    assert rebalance(load, membership, 6, near=old) == old
    shifted = old.replace_slots(np.roll(old.slot_expert, 5, axis=1))  # other ranks and slots
    back = rebalance(load, membership, 6, near=shifted)
    fresh = rebalance(load, membership, 6)
    np.testing.assert_allclose(
        np.sort(back.rank_load(load)), np.sort(fresh.rank_load(load)), rtol=1e-12
    )
    kept = [(p.slot_expert == shifted.slot_expert).mean() for p in (back, fresh)]
    assert kept[0] > 2 * kept[1]
    swapped = old.replace_slots(
        np.roll(old.slot_expert, 6, axis=1)
    )  # every rank's slots on the next
    assert rebalance(load, membership, 6, near=swapped) == swapped


def test_near_a_placement_with_an_expert_twice_on_a_rank_keeps_one_of_them():
    twice = Placement(np.asarray([[0, 0, 1, 1, 2, 3]]), 4, 2)
    placement = rebalance(np.asarray([[9, 9, 1, 1]]), Membership.initial(2), 3, near=twice)
    placement.check()
    assert placement.holders.max() == 1 and placement.slot_expert[0, 0] == 0


def test_a_layer_without_load_counts_as_even():
    placement = rebalance(np.zeros((1, 4)), Membership.initial(3), 2)
    assert sorted(placement.copies[0].tolist()) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.asarray([[1.0, -2.0]]), 2), "load must be finite and >= 0; got -2.0"),
        ((np.asarray([[1.0, np.nan]]), 2), "load must be finite and >= 0; got nan"),
        ((np.ones((1, 2)), 0), "slots_per_rank and floor must be >= 1; got 0 and 2"),
    ],
)
def test_rebalance_refuses_bad_numbers(arguments, message):
    load, slots = arguments
    with pytest.raises(ValueError, match=message):
        rebalance(load, Membership.initial(2), slots)


def test_too_few_slots_say_how_many_and_which_ranks_would_help():
    membership = Membership.initial(4).without([1, 3])
    with pytest.raises(CoverageLost) as error:
        rebalance(np.ones((2, 8)), membership, 3)
    assert str(error.value) == (
        "2 slots are missing per layer: 2 active ranks have 3 each, for 8 experts. Bring back 1 of ranks 1, 3."
    )
    assert error.value.slots_missing == 2 and error.value.ranks_needed == (1, 3)
    with pytest.raises(CoverageLost, match=r"Give each rank more slots \(redundant experts\)\."):
        rebalance(np.ones((2, 8)), Membership.initial(2), 3)


def test_checks_name_uncovered_experts_and_dead_ranks_that_hold_some():
    membership = Membership.initial(2).without([1])
    placement = Placement(np.asarray([[0, 2, 2, -1]]), 4, 2)
    with pytest.raises(ValueError, match=r"must be -1 in epoch 1; rank 1 holds experts of layer 0"):
        placement.check(membership)
    message = r"\(layer 0, expert 1\) and 1 more have none"
    with pytest.raises(CoverageLost, match=message) as error:
        placement.check()
    assert error.value.missing == ((0, 1), (0, 3))
    with pytest.raises(ValueError, match="capacity of 2 ranks; got 3"):
        placement.check(Membership.initial(3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.asarray([[0, 1, 2]]), 3, 2), "as many slots on every rank: a multiple of 2 in all"),
        ((np.asarray([[0, 3]]), 3, 2), "must hold -1 or experts below 3; got 3"),
        ((np.asarray([[0, -2]]), 3, 2), "must hold -1 or experts below 3; got -2"),
        ((np.zeros((0, 4), int), 3, 2), "needs layers, slots, experts and ranks"),
    ],
)
def test_a_malformed_placement_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Placement(*arguments)


def test_placements_are_values():
    table = np.asarray([[0, 1, 1, -1]])
    placement = Placement(table, 2, 2)
    table[0, 0] = 1
    assert placement.slot_expert[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.slot_expert[0, 0] = 1
    again = Placement.from_dict(json.loads(json.dumps(placement.to_dict())))
    assert again == placement and hash(again) == hash(placement)
    assert placement != placement.without([1]) and placement != Placement(table, 2, 4)
    assert "1 layers, 2 experts, 2 ranks x 2 slots, min copies 1" in repr(placement)


def test_tables_refuse_what_does_not_fit():
    placement = Placement(np.asarray([[0, 0, 0, 1]]), 2, 2)
    with pytest.raises(ValueError, match="order must name ranks below 2, each once; got"):
        placement.tables([0, 0])
    with pytest.raises(CoverageLost, match=r"\(layer 0, expert 1\) has none"):
        placement.tables([0])
    with pytest.raises(ValueError, match="max_copies must be at least 3.*got 2"):
        placement.tables(max_copies=2)

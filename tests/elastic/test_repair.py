"""Plans of repair: coverage, only orphans move, live sources only, the same bytes every time, and clear refusals."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.elastic import (
    Bandwidths,
    CoverageLost,
    Inventory,
    Membership,
    Placement,
    checksum,
    host_backup,
    plan_join,
    plan_moves,
    plan_repair,
    rebalance,
    restore_floor,
)


class Cluster:
    """A cluster's state with the moves of plans carried out for real, on weights that say which expert they are."""

    def __init__(self, load, ranks, slots, *, floor=2, host=None, checkpoint=True):
        self.load, self.slots = load, slots
        self.membership = Membership.initial(ranks)
        self.placement = rebalance(load, self.membership, slots, floor=floor)
        layers, experts = load.shape
        canaries = 1000 + np.arange(layers * experts).reshape(layers, experts)
        self.inventory = Inventory.of(
            self.placement, 10, host=host, checkpoint=checkpoint, canaries=canaries
        )
        self.bandwidths = Bandwidths.uniform(ranks)
        self.memory = self.placement.slot_expert.copy()

    def kill(self, ranks):
        self.membership = self.membership.without(ranks)
        self.inventory = self.inventory.without(ranks, self.slots)
        self.memory.reshape(len(self.memory), -1, self.slots)[:, ranks] = -1

    def arguments(self):
        return self.placement, self.membership, self.inventory, self.bandwidths

    def carry_out(self, plan, *, joining=None):
        """Makes the moves: all reads, then all writes; every source has to be alive and to hold what it should."""
        alive = {*self.membership.ranks, joining}
        for move in plan.moves:
            assert move.rank == move.slot // self.slots and move.rank in alive
            assert move.canary == 1000 + move.layer * self.placement.experts + move.expert
            if move.source in ("in place", "peer"):
                assert self.memory[move.layer, move.source_slot] == move.expert
                assert move.source_rank == move.source_slot // self.slots
                assert move.source_rank in alive
                assert (move.source == "in place") == (move.source_rank == move.rank)
            elif move.source == "host":
                assert self.inventory.host[move.source_rank, move.layer, move.expert]
                assert move.source_rank in self.membership.ranks
        for move in plan.moves:
            self.memory[move.layer, move.slot] = move.expert
        self.inventory = self.inventory.after(plan)
        self.placement = plan.placement
        listed = self.placement.slot_expert
        np.testing.assert_array_equal(np.where(listed >= 0, self.memory, -1), listed)
        np.testing.assert_array_equal(self.inventory.held, self.memory)


@st.composite
def shapes(draw):
    """Load, ranks, slots per rank; some ranks can be lost."""
    experts, ranks = draw(st.integers(2, 8)), draw(st.integers(2, 6))
    slots = draw(st.integers(-(-experts // (ranks - 1)), experts))
    values = st.lists(st.integers(0, 50), min_size=experts, max_size=experts)
    return np.asarray(draw(st.lists(values, min_size=1, max_size=3))), ranks, slots


@given(shapes(), st.data())
def test_repairs_down_to_the_last_set_of_ranks_that_can_cover(shape, data):
    cluster = Cluster(*shape)
    experts = cluster.placement.experts
    while True:
        alive = cluster.membership.ranks
        gone = data.draw(st.lists(st.sampled_from(alive), min_size=1, max_size=2, unique=True))
        cluster.kill(gone)
        capacity = len(cluster.membership.ranks) * cluster.slots
        before = cluster.placement
        orphans = before.without(gone).copies == 0
        if capacity < experts:
            with pytest.raises(CoverageLost, match="slots are missing per layer") as error:
                plan_repair(*cluster.arguments())
            assert error.value.missing == tuple(map(tuple, np.argwhere(orphans)))
            assert error.value.slots_missing == experts - capacity
            return
        plan = plan_repair(*cluster.arguments(), load=cluster.load)
        assert plan.epoch == cluster.membership.epoch
        plan.placement.check(cluster.membership)
        # Only orphans move, each once, and no live slot changes but those that take them.
        assert sorted((m.layer, m.expert) for m in plan.moves) == list(
            map(tuple, np.argwhere(orphans))
        )
        changed = np.argwhere(plan.placement.slot_expert != before.without(gone).slot_expert)
        assert [tuple(c) for c in changed] == [(m.layer, m.slot) for m in plan.moves]
        assert plan.placement.holders.max() == 1
        again = plan_repair(*cluster.arguments(), load=cluster.load)
        assert again.digest == plan.digest and again.moves == plan.moves
        cluster.carry_out(plan)


@given(shapes(), st.data())
def test_repair_then_join_then_fail_again(shape, data):
    cluster = Cluster(*shape)
    for _ in range(3):
        gone = data.draw(st.sampled_from(cluster.membership.ranks))
        full = cluster.placement
        cluster.kill([gone])
        cluster.carry_out(plan_repair(*cluster.arguments()))
        repaired = cluster.placement
        mine = np.zeros(full.slots, bool)
        mine[gone * cluster.slots : (gone + 1) * cluster.slots] = True
        before = data.draw(st.sampled_from([None, full]))
        joined = plan_join(
            repaired, cluster.membership, gone, *cluster.arguments()[2:], before=before
        )
        # Others keep theirs; the plan is the same before and after the rank is admitted.
        np.testing.assert_array_equal(
            joined.placement.slot_expert[:, ~mine], repaired.slot_expert[:, ~mine]
        )
        assert {move.rank for move in joined.moves} <= {gone}
        if before is not None:
            np.testing.assert_array_equal(
                joined.placement.slot_expert[:, mine], full.slot_expert[:, mine]
            )
        else:
            assert joined.placement.holders.max() == 1
            assert (joined.placement.slot_expert[:, mine] >= 0).all()
        cluster.membership = cluster.membership.with_joined(gone, cluster.membership.epoch)
        after = plan_join(
            repaired, cluster.membership, gone, *cluster.arguments()[2:], before=before
        )
        assert after.moves == joined.moves and after.placement == joined.placement
        cluster.carry_out(after, joining=gone)
        cluster.placement.check(cluster.membership)


@given(shapes(), st.data())
def test_the_floor_is_restored_as_far_as_slots_allow(shape, data):
    cluster = Cluster(*shape)
    gone = data.draw(st.sampled_from(cluster.membership.ranks))
    cluster.kill([gone])
    cluster.carry_out(plan_repair(*cluster.arguments(), load=cluster.load))
    before = cluster.placement
    alive, experts = len(cluster.membership.ranks), before.experts
    target = max(1, min(2, alive, alive * cluster.slots // experts))
    plan = restore_floor(*cluster.arguments(), load=cluster.load)
    cluster.carry_out(plan)
    after = cluster.placement
    after.check(cluster.membership)
    assert (after.spread >= np.minimum(before.spread, target)).all()
    for move in plan.moves:
        assert before.spread[move.layer, move.expert] < target
    # Whoever is still short finds no slot on a rank without it, whose expert could spare it.
    for layer, expert in np.argwhere(after.spread < target):
        for rank in cluster.membership.ranks:
            if after.holders[layer, rank, expert] == 0:
                others = np.flatnonzero(after.holders[layer, rank])
                assert (after.spread[layer, others] <= target).all()
                assert after.holders[layer, rank].sum() == cluster.slots


def test_a_floor_of_two_survives_any_loss_without_a_move_and_is_restored_from_peers():
    load = np.random.default_rng(0).lognormal(0, 1, (3, 16))
    for rank in range(8):
        cluster = Cluster(load, 8, 6)
        cluster.kill([rank])
        plan = plan_repair(*cluster.arguments())
        assert plan.moves == () and plan.seconds(cluster.bandwidths) == 0
        cluster.carry_out(plan)
        assert cluster.placement.spread.min() == 1
        plan = restore_floor(*cluster.arguments(), load=load)
        assert {move.source for move in plan.moves} == {"peer"}
        cluster.carry_out(plan)
        assert cluster.placement.spread.min() == 2


def orphan_case(**more):
    """Rank 2's loss orphans expert 2; slot 1 holds a second copy of expert 0."""
    placement = Placement(np.asarray([[0, 0, 1, 0, 2, 1]]), 3, 3)
    inventory = Inventory.of(placement, 10, **more).without([2], 2)
    return placement, Membership.initial(3).without([2]), inventory, Bandwidths.uniform(3)


def one_move(*arguments):
    (move,) = plan_repair(*arguments).moves
    assert (move.layer, move.expert) == (0, 2)
    return move


def test_sources_are_tried_in_order_and_a_damaged_one_only_once():
    host = np.zeros((3, 1, 3), bool)
    host[:, 0, 2] = True
    placement, membership, inventory, bandwidths = orphan_case(host=host, checkpoint=True)
    held = inventory.held.copy()
    # Unlisted leftovers: slots whose memory holds expert 2, though the placement says otherwise.
    held[0, 1] = held[0, 3] = 2
    inventory = dataclasses.replace(inventory, held=held)
    sources = []
    for _ in range(5):
        move = one_move(placement, membership, inventory, bandwidths)
        sources.append((move.source, move.source_rank, move.slot))
        inventory = inventory.without_source(move)
    # In place costs nothing. When the one in slot 1 turns out to be damaged, the one in slot 3 is there; then no device.
    assert [s[0] for s in sources] == ["in place", "in place", "host", "host", "checkpoint"]
    assert {s[2] for s in sources[:2]} == {1, 3}
    assert {s[1] for s in sources[2:4]} == {0, 1}  # never host 2, which died with its rank
    with pytest.raises(CoverageLost, match="has no source"):
        plan_repair(placement, membership, inventory, bandwidths)


def test_a_living_copy_is_used_even_if_lower_ranks_that_held_one_are_dead():
    placement = Placement(np.asarray([[0, 1, 2, 1, 0, 2, 1, 2]]), 3, 4)
    membership = Membership.initial(4).without([0])
    # Its old process is not reported as gone: liveness must come from the membership alone.
    inventory = Inventory.of(placement, 10, host=np.ones((4, 1, 3), bool), checkpoint=True)
    new = Placement(np.asarray([[-1, -1, 2, 1, 0, 2, 0, 2]]), 3, 4)
    plan = plan_moves(placement, new, membership, inventory, Bandwidths.uniform(4))
    assert [(m.source, m.source_rank, m.source_slot) for m in plan.moves] == [("peer", 2, 4)]
    dead = Membership.initial(4).without([0, 2])
    new = Placement(np.asarray([[-1, -1, 0, 1, -1, -1, 1, 2]]), 3, 4)
    plan = plan_moves(placement, new, dead, inventory, Bandwidths.uniform(4))
    assert [(m.source, m.source_rank) for m in plan.moves] == [("host", 1)]


def test_a_host_that_no_rank_owns_outlives_all_ranks():
    host = np.zeros((1, 1, 3), bool)
    host[0, 0, 2] = True
    placement, membership, inventory, _ = orphan_case(host=host, host_owner=[-1])
    move = one_move(placement, membership, inventory, Bandwidths.uniform(3, hosts=1))
    assert (move.source, move.source_rank, move.size_bytes) == ("host", 0, 10)


def test_a_source_without_a_link_is_none():
    host = np.zeros((3, 1, 3), bool)
    host[0, 0, 2] = True
    placement, membership, inventory, bandwidths = orphan_case(host=host, checkpoint=True)
    assert one_move(placement, membership, inventory, bandwidths).source == "host"
    cut = dataclasses.replace(bandwidths, host=np.zeros((3, 3)))
    assert one_move(placement, membership, inventory, cut).source == "checkpoint"
    with pytest.raises(CoverageLost):
        plan_repair(
            placement, membership, inventory, dataclasses.replace(cut, checkpoint=np.zeros(3))
        )


def test_an_expert_without_source_is_named_with_the_ranks_that_had_it():
    host = np.zeros((3, 1, 3), bool)
    host[2, 0, 2] = True
    placement = Placement(np.asarray([[0, 0, 1, 0, 2, 1]]), 3, 3)
    inventory = Inventory.of(placement, 10, host=host)
    with pytest.raises(CoverageLost) as error:
        plan_repair(placement, Membership.initial(3).without([2]), inventory, Bandwidths.uniform(3))
    assert str(error.value) == (
        "(layer 0, expert 2) has no source: no active rank, live host copy or checkpoint that can be reached holds it. "
        "They were last on ranks 2. Name a checkpoint that has them."
    )
    assert error.value.missing == ((0, 2),) and error.value.ranks_needed == (2,)


def test_missing_slots_are_counted_and_experts_named():
    placement = Placement(np.asarray([[0, 1, 2, 3, 4, 5]]), 6, 3)
    membership = Membership.initial(3).without([1, 2])
    inventory = Inventory.of(placement, 10, checkpoint=True).without([1, 2], 2)
    with pytest.raises(CoverageLost) as error:
        plan_repair(placement, membership, inventory, Bandwidths.uniform(3))
    assert str(error.value) == (
        "(layer 0, expert 2) and 3 more have no copy and 4 slots are missing per layer: 1 active ranks have 2 each, "
        "for 6 experts. Bring back 2 of ranks 1, 2."
    )
    assert error.value.missing == ((0, 2), (0, 3), (0, 4), (0, 5))


def test_a_failure_during_a_repair_is_planned_from_what_memory_holds():
    load = np.random.default_rng(2).lognormal(0, 1, (2, 12))
    cluster = Cluster(load, 5, 5, floor=1)
    cluster.kill([0])
    first = plan_repair(*cluster.arguments())
    assert len(first.moves) > 1
    # Half of the moves are done, none is adopted, and the next rank dies.
    for move in first.moves[::2]:
        cluster.memory[move.layer, move.slot] = move.expert
    cluster.inventory = dataclasses.replace(cluster.inventory, held=cluster.memory.copy())
    cluster.kill([4])
    second = plan_repair(*cluster.arguments())
    cluster.carry_out(second)
    cluster.placement.check(cluster.membership)
    # What had arrived on survivors is not fetched again.
    arrived = {(m.layer, m.expert) for m in first.moves[::2] if m.rank != 4}
    assert arrived
    for move in second.moves:
        if (move.layer, move.expert) in arrived:
            assert (move.source, move.size_bytes) == ("in place", 0)


def test_repair_keeps_ranks_even():
    # Rank 3 holds expert 3 alone. Ranks 0 and 1 carry as much else; donors 0 (three copies) are everywhere.
    placement = Placement(np.asarray([[0, 1, 0, 2, 0, 4, 3, 4]]), 5, 4)
    load = np.asarray([[3.0, 9, 9, 5, 2]])
    inventory = Inventory.of(placement, 10, checkpoint=True).without([3], 2)
    plan = plan_repair(
        placement,
        Membership.initial(4).without([3]),
        inventory,
        Bandwidths.uniform(4),
        load=load,
    )
    (move,) = plan.moves
    assert (move.expert, move.slot) == (3, 4)  # on rank 2, which carries least


def test_peers_share_the_sending():
    # Rank 0 and rank 1 hold all six experts; rank 2 and 3 shall get them too.
    old = Placement(np.asarray([[0, 1, 2, 0, 1, 2, -1, -1, -1, -1, -1, -1]]), 3, 4)
    new = Placement(np.asarray([[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]]), 3, 4)
    membership, bandwidths = Membership.initial(4), Bandwidths.uniform(4, peer=10.0)
    plan = plan_moves(old, new, membership, Inventory.of(old, 10), bandwidths)
    batches = plan.batches()
    assert sum(map(len, batches.values())) == 6
    sent = [sum(m.size_bytes for m in plan.moves if m.source_rank == r) for r in (0, 1)]
    assert sent == [30, 30]
    assert (
        plan.seconds(bandwidths) == 3.0
    )  # three experts at one second each, into either and out of either
    # A link ten times slower is left to what must use it.
    peer = bandwidths.peer.copy()
    peer[0, 2:] = 1.0
    slow = dataclasses.replace(bandwidths, peer=peer, latency_s=0.5)
    plan = plan_moves(old, new, membership, Inventory.of(old, 10), slow)
    assert {link.source_rank for link in plan.batches()} == {1}
    assert plan.seconds(slow) == 6.5
    assert plan.bytes_by_source() == {"peer": 60}


def test_experts_with_one_source_are_served_first():
    # Only rank 0 has expert 1; expert 0, though its slot comes first, must leave rank 0 to it.
    old = Placement(np.asarray([[0, 1, 0, 2, -1, -1, -1, -1]]), 3, 4)
    new = Placement(np.asarray([[0, 1, 0, 2, 0, -1, 1, -1]]), 3, 4)
    plan = plan_moves(
        old, new, Membership.initial(4), Inventory.of(old, 10), Bandwidths.uniform(4, peer=10.0)
    )
    assert [m.source_rank for m in plan.moves] == [1, 0]
    assert plan.seconds(Bandwidths.uniform(4, peer=10.0)) == 1.0


def test_what_a_process_held_does_not_come_back_with_its_rank():
    host = np.zeros((3, 1, 3), bool)
    host[2, 0, 2] = True
    placement, membership, inventory, bandwidths = orphan_case(host=host, checkpoint=True)
    returned = membership.with_joined(2, 1)
    plan = plan_repair(placement, returned, inventory, bandwidths)
    assert [(m.expert, m.rank, m.source) for m in plan.moves] == [(2, 2, "checkpoint")]


def test_a_join_without_memory_of_before_fills_what_is_short_then_what_is_hot():
    placement = Placement(np.asarray([[0, 1, 0, 2, 3, 1, -1, -1]]), 4, 4)
    membership = Membership.initial(4).without([3])
    inventory = Inventory.of(placement, 10)
    load = np.asarray([[100.0, 40, 1, 2]])
    plan = plan_join(placement, membership, 3, inventory, Bandwidths.uniform(4), load=load)
    assert plan.placement.slot_expert[0, 6:].tolist() == [3, 2]  # both have one copy only
    plan = plan_join(placement, membership, 3, inventory, Bandwidths.uniform(4), load=load, floor=1)
    assert plan.placement.slot_expert[0, 6:].tolist() == [0, 1]  # 50 and 20 per copy
    assert [(m.source, m.source_rank) for m in plan.moves] == [("peer", 0), ("peer", 2)]


@pytest.mark.misuse
@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 4}, "rank must be below 4; got 4"),
        ({"rank": 0}, r"slots of joining rank 0 must be empty \(-1\)"),
        (
            {"before": Placement(np.asarray([[0, 1, 2, 3]]), 4, 4)},
            "before must be a placement like",
        ),
        ({"load": np.ones((1, 3))}, r"load must be \[layers, experts\] = \(1, 4\)"),
        ({"bandwidths": Bandwidths.uniform(3)}, r"bandwidths.peer must be \[4, 4\] for Placement"),
    ],
)
def test_a_join_that_does_not_fit_is_refused(change, message):
    placement = Placement(np.asarray([[0, 1, 0, 2, 3, 1, -1, -1]]), 4, 4)
    arguments = {
        "placement": placement,
        "membership": Membership.initial(4).without([3]),
        "rank": 3,
        "inventory": Inventory.of(placement, 10),
        "bandwidths": Bandwidths.uniform(4),
    }
    with pytest.raises(ValueError, match=message):
        plan_join(**(arguments | change))


def test_the_floor_needs_a_covering_placement():
    placement, membership, inventory, bandwidths = orphan_case()
    with pytest.raises(CoverageLost, match=r"\(layer 0, expert 2\) has none"):
        restore_floor(placement.without([2]), membership, inventory, bandwidths)
    with pytest.raises(ValueError, match="floor must be >= 1; got 0"):
        restore_floor(placement, Membership.initial(3), inventory, bandwidths, floor=0)


def test_host_backups_keep_every_expert_as_often_as_asked():
    kept = host_backup(3, 2, 8, copies=2)
    assert (kept.sum(0) == 2).all() and kept.any(-1).all()
    assert np.ptp(host_backup(4, 1, 8).sum((1, 2))) == 0
    with pytest.raises(ValueError, match=r"copies must be from 1 to the number of hosts \(3\)"):
        host_backup(3, 2, 8, copies=4)


def test_a_checksum_tells_any_change():
    leaves = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float16)]
    value = checksum(leaves)
    assert checksum([leaf.copy() for leaf in leaves]) == value
    assert checksum([leaves[0].T.copy().T, leaves[1]]) == value  # layout in memory is no matter
    flipped = leaves[0].copy()
    flipped.view(np.uint8)[0, 0] ^= 1
    others = [[flipped, leaves[1]], leaves[::-1], leaves[:1], [leaves[0].reshape(3, 2), leaves[1]]]
    assert value not in [checksum(other) for other in others]


@pytest.mark.misuse
def test_malformed_inventories_and_bandwidths_are_refused():
    placement = Placement(np.asarray([[0, 1]]), 2, 2)
    with pytest.raises(ValueError, match=r"host must have dimensions \(1, 2\) here; got \(1, 3\)"):
        Inventory.of(placement, 10, host=np.zeros((2, 1, 3), bool))
    with pytest.raises(ValueError, match="host_owner"):
        Inventory.of(placement, 10, host_owner=[0])
    with pytest.raises(ValueError, match="peer must be > 0 on its diagonal"):
        Bandwidths.uniform(2, local=0.0)
    with pytest.raises(ValueError, match="host must be >= 0 bytes per second; got -1.0"):
        Bandwidths.uniform(2, host=-1.0)

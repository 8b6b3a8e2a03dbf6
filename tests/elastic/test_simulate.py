"""The model of recoveries against EEP's published runs (arXiv 2605.10670), and what minimal repair makes of them."""

import dataclasses

import pytest

from bench.elastic_simulate import EEP
from jaxmoe.elastic import CoverageLost
from jaxmoe.elastic.simulate import Machine, largest_loss, lost_by_node, recover


@pytest.mark.parametrize("count", EEP)
def test_eeps_policy_has_eeps_sources_and_times(count):
    # A few layers stand for 58, with as many bytes in all.
    whole = Machine()
    machine = dataclasses.replace(whole, layers=8, expert_bytes=whole.expert_bytes * 58 // 8)
    seconds, shares = EEP[count]
    got = recover(machine, lost_by_node(machine, count, 0), "eep")
    assert [got.shares[kind] for kind in ("in place", "peer", "host")] == pytest.approx(
        shares, rel=0.25
    )
    assert sum(got.shares.values()) == pytest.approx(1)
    assert got.pause_s == pytest.approx(seconds, rel=0.25)


def test_minimal_repair_moves_orphans_only_and_the_floor_saves_single_losses():
    machine = Machine(layers=4)
    eep = recover(machine, [5], "eep")
    safe = recover(machine, [5], "minimal")
    bare = recover(machine, [5], "minimal", floor=1)
    assert safe.moved_bytes == 0 and safe.seconds["peer"] == safe.seconds["host"] == 0
    assert 0 < bare.moved_bytes < 0.03 * eep.moved_bytes
    assert bare.seconds["host"] > machine.host_latency_s  # no device has an orphan
    assert safe.pause_s < bare.pause_s < eep.pause_s
    assert safe.final_imbalance < 1.05 < safe.imbalance and safe.background_s > 0


def test_the_same_arguments_give_the_same_recovery():
    machine = Machine(ranks=64, slots_per_rank=6, layers=2)
    first, second = (recover(machine, [1, 40], "minimal", seed=3) for _ in range(2))
    assert first == second


def test_a_loss_of_more_than_the_largest_is_refused():
    machine = Machine(layers=2)
    assert largest_loss(machine) == 16
    recover(machine, list(range(16)), "minimal")
    with pytest.raises(CoverageLost, match="16 slots are missing per layer"):
        recover(machine, list(range(17)), "minimal")


@pytest.mark.misuse
def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"multiple of ranks_per_node \(8\); got 30"):
        Machine(ranks=30)
    with pytest.raises(ValueError, match='policy must be "eep" or "minimal"; got \'fast\''):
        recover(Machine(layers=1), [0], "fast")

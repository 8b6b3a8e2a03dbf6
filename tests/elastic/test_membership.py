"""Membership: epochs only grow, ranks keep their numbers, fenced processes stay out."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.elastic import Fence, Ledger, Membership, StaleMembership


def test_losing_and_rejoining_leaves_and_fills_a_hole():
    first = Membership.initial(3, capacity=4)
    lost = first.without([1])
    assert (lost.epoch, lost.ranks, lost.capacity) == (1, (0, 2), 4)
    back = lost.with_joined(1, 1)
    assert (back.epoch, back.ranks) == (2, (0, 1, 2))
    grown = back.with_joined(3, 0)  # a rank that never was there begins with incarnation 0
    assert (grown.epoch, grown.ranks, grown.incarnations) == (3, (0, 1, 2, 3), (0, 1, 0, 0))
    assert first.ranks == (0, 1, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.without([]), "ranks must name at least one rank to remove; got none"),
        (
            lambda m: m.without([0, 2]),
            r"ranks must be active in epoch 1 \(0, 1\); got 2",
        ),
        (lambda m: m.with_joined(0, 5), r"rank must be an inactive one in epoch 1 \(2\); got 0"),
        (lambda m: m.with_joined(3, 5), r"rank must be an inactive one in epoch 1 \(2\); got 3"),
        (lambda m: m.with_joined(2, 0), "incarnation of rank 2 must be higher than 0, its last"),
    ],
)
def test_impossible_changes_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        change(Membership.initial(3).without([2]))


def test_messages_of_other_epochs_and_processes_are_refused():
    now = Membership.initial(3, capacity=4).without([1]).with_joined(1, 4).without([2])
    assert now.admits(3, 1, 4)
    assert now.refusal(2, 1, 4) == "old epoch"
    assert now.refusal(4, 1, 4) == "new epoch"
    assert now.refusal(3, 1, 0) == "old incarnation"
    assert now.refusal(3, 1, 5) == "new incarnation"
    assert now.refusal(3, 2, 0) == "inactive rank"
    assert now.refusal(3, 4, 0) == "unknown rank"


@given(st.data())
def test_a_process_once_removed_never_is_admitted_again(data):
    now, fenced = Membership.initial(4), set()
    for _ in range(8):
        before = now
        if len(now.ranks) > 1 and (len(now.ranks) == 4 or data.draw(st.booleans())):
            rank = data.draw(st.sampled_from(now.ranks))
            fenced.add((rank, now.incarnations[rank]))
            now = now.without([rank])
        else:
            rank = data.draw(st.sampled_from(sorted(set(range(4)) - set(now.ranks))))
            now = now.with_joined(rank, now.incarnations[rank] + data.draw(st.integers(1, 3)))
        assert now.epoch == before.epoch + 1
        before.check_successor(now)
        for rank, incarnation in fenced:
            assert not now.admits(now.epoch, rank, incarnation)
            with pytest.raises(ValueError):
                now.without(now.ranks).with_joined(rank, incarnation)
    assert Membership.from_dict(json.loads(json.dumps(now.to_dict()))) == now


def test_of_changes_planned_from_one_epoch_only_one_is_committed():
    first = Membership.initial(8)
    ledger, winners, losers = Ledger(first), [], []
    start = threading.Barrier(8)

    def remove(rank):
        start.wait()
        try:
            winners.append(ledger.commit(0, first.without([rank])))
        except StaleMembership as error:
            losers.append(str(error))

    threads = [threading.Thread(target=remove, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1 and ledger.history == (first, winners[0])
    assert (
        losers == ["the change was planned from epoch 0 and the current one is 1; plan again."] * 7
    )


def test_a_ledger_takes_no_membership_that_cannot_follow():
    now = Membership.initial(2).without([1])
    ledger = Ledger(now)
    with pytest.raises(ValueError, match="epoch must be higher than 1, the current one; got 0"):
        ledger.commit(1, Membership.initial(2))
    with pytest.raises(ValueError, match="incarnation of rank 1 must be at least 1; got 0"):
        ledger.commit(1, Membership(2, (True, True), (0, 0)))
    with pytest.raises(ValueError, match="capacity is fixed at 2 ranks; got a membership of 3"):
        ledger.commit(1, Membership(2, (True,) * 3, (1,) * 3))
    assert ledger.current == now


def test_a_fence_counts_what_it_drops_by_kind_and_reason():
    first = Membership.initial(2)
    fence = Fence(first)
    assert fence.admits("tokens", 0, 1, 0)
    fence.adopt(first.without([1]))
    fence.adopt(first.without([1]))
    assert not fence.admits("tokens", 0, 1, 0)
    assert not fence.admits("tokens", 0, 0, 0)
    assert not fence.admits("heartbeat", 0, 0, 0)
    assert fence.admits("tokens", 1, 0, 0)
    assert fence.dropped == {
        ("tokens", "inactive rank"): 1,
        ("tokens", "old epoch"): 1,
        ("heartbeat", "old epoch"): 1,
    }
    with pytest.raises(ValueError, match="epoch must be higher than 1"):
        fence.adopt(first)


@pytest.mark.parametrize(
    "values, message",
    [
        ((-1, (True,), (0,)), "epoch must be >= 0; got -1"),
        ((0, (), ()), "active must have an entry per rank; got none"),
        ((0, (True,), (0, 0)), r"incarnations must have an entry per rank \(1\); got 2"),
        ((0, (True,), (-1,)), "got -1 for rank 0"),
    ],
)
def test_a_malformed_membership_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Membership(*values)


def test_a_dictionary_with_other_fields_is_refused():
    with pytest.raises(ValueError, match="exactly active, epoch, incarnations; got epoch"):
        Membership.from_dict({"epoch": 1})
    with pytest.raises(ValueError, match="ranks must be from 1 to capacity; got ranks=3"):
        Membership.initial(3, capacity=2)

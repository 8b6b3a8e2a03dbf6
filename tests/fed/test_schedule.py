"""Schedules: each example in each epoch once, whoever else takes part."""

import tracemalloc

import fed_support as support
import numpy as np
import pytest

from fed import schedule

SIZES = [17, 0, 3, 40, 8, 1, 25, 33]
PART = support.ragged(200, SIZES)


def made(clients, **more):
    given = {"seed": 0, "round_number": 2, "epochs": 3, "batch_size": 8} | more
    return list(schedule.buckets(PART, clients, **given))


def rows(buckets):
    """(index, mask) of each client's live steps."""
    return {
        int(client): (bucket.index[i], bucket.mask[i])
        for bucket in buckets
        for i, client in enumerate(bucket.clients)
    }


def test_every_epoch_sees_each_example_once():
    for client, (index, mask) in rows(made(range(8))).items():
        per_epoch = -(-SIZES[client] // 8)
        for epoch in range(3):
            at = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
            assert sorted(index[at][mask[at]].tolist()) == PART[client].tolist()
        assert not mask[3 * per_epoch :].any()


def test_orders_differ_between_epochs_rounds_and_seeds():
    index = rows(made([3]))[3][0]
    assert not np.array_equal(index[:5], index[5:10])
    assert not np.array_equal(index, rows(made([3], round_number=3))[3][0])
    assert not np.array_equal(index, rows(made([3], seed=1))[3][0])


def test_a_client_does_not_depend_on_who_else_was_sampled():
    everybody, few = rows(made(range(8))), rows(made([6, 3]))
    for client in (3, 6):
        live = few[client][1].any(1).sum()
        assert np.array_equal(few[client][0][:live], everybody[client][0][:live])


def test_empty_clients_have_nothing_to_do():
    assert 1 not in rows(made(range(8))) and made([1]) == []


def test_fixed_steps_go_round_the_data_in_full_batches():
    for client, (index, mask) in rows(made([2, 4, 7], steps=6)).items():
        assert mask.all() and mask.shape == (6, 8)
        counts = np.bincount(index.reshape(-1), minlength=200)[PART[client]]
        assert np.ptp(counts) <= 1 and counts.sum() == 48


def test_a_straggler_stops_where_its_limit_says():
    whole, part = rows(made([3])), rows(made([3], limits=np.array([4])))
    assert part[3][1].any(1).sum() == 4
    assert np.array_equal(part[3][0][:4], whole[3][0][:4])


def test_more_buckets_pad_less():
    many = support.ragged(20000, np.random.default_rng(0).integers(1, 300, 100).tolist())

    def useful(most):
        found = schedule.buckets(
            many, range(100), seed=0, round_number=0, epochs=1, batch_size=8, most=most
        )
        steps = [(b.mask.any(2).sum(), b.mask.shape[0] * b.mask.shape[1]) for b in found]
        assert len(steps) <= most
        return sum(s[0] for s in steps) / sum(s[1] for s in steps)

    shares = [useful(n) for n in (1, 2, 4)]
    assert shares == sorted(shares) and shares[0] < 0.6 < 0.75 < shares[-1]


@pytest.mark.parametrize("count", [1, 5, 9, 13, 100, 1000])
def test_padded_step_counts_waste_less_than_half(count):
    assert count <= schedule.round_up(count) < 1.5 * count + 1


def test_what_is_padded_is_a_client_s_own():
    for client, (index, _) in rows(made(range(8))).items():
        assert set(index.reshape(-1).tolist()) <= set(PART[client].tolist())


def test_one_large_client_does_not_blow_up_the_orders_of_small_ones(monkeypatch):
    """A client of one example goes 800 times round; beside one of 500 that would be 3.2 GB for a thousand."""
    sizes = [1] * 99 + [500]
    part = support.ragged(600, sizes)

    def found():
        more = {"seed": 0, "round_number": 0, "epochs": 1, "batch_size": 16, "steps": 50, "most": 1}
        return next(schedule.buckets(part, range(100), **more))

    tracemalloc.start()
    usual = found()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20  # at once it would be 99 x 800 x 500 x 8 bytes = 317 MB, twice
    monkeypatch.setattr(schedule, "_MOST_DRAWN", 1)  # each client by itself
    assert np.array_equal(found().index, usual.index)
    monkeypatch.setattr(schedule, "_alike", lambda sizes, slots: [np.arange(len(sizes))])
    few = [0, 5, 99]
    together = next(
        schedule.buckets(part, few, seed=0, round_number=0, epochs=1, batch_size=16, steps=50)
    )
    assert np.array_equal(together.index, usual.index[few])


@pytest.mark.parametrize("name", ["epochs", "batch_size", "steps", "most"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got -1"):
        made(range(8), **{name: -1})

"""Which examples a client trains on at which step: index tensors and masks, made on the host (spec 5.1).

A client's order of examples is a hash of (seed, round, client, epoch, position): it depends neither on who else was sampled nor on
how clients are grouped, and 10,000 clients are scheduled in one vectorised pass.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from fed.partition import Partition

# Padded step counts: the number of compiled programs stays bounded, and less than a third of a bucket's steps is padding.
_LADDER = sorted({*range(1, 9), *(m * 2**k for k in range(2, 20) for m in (2, 3))})
_MOST_DRAWN = 2**21  # random numbers that exist at once: 16 MiB, a few times over


@dataclasses.dataclass(frozen=True, eq=False)
class Bucket:
    """Clients with about as many steps.

    Attributes:
      clients: their numbers [K].
      index: examples of each step [K, S, B]; where padded one of the client's own, so that no other's can reach it.
      mask: which of them are real [K, S, B].
    """

    clients: Int[np.ndarray, " K"]
    index: Int[np.ndarray, "K S B"]
    mask: Bool[np.ndarray, "K S B"]


def steps_of(
    sizes: Int[np.ndarray, " N"], epochs: int, batch_size: int, steps: int | None
) -> Int[np.ndarray, " N"]:
    """Steps of clients of these sizes: whole epochs with a short last batch each, or ``steps``; none without data."""
    if steps is not None:
        return np.where(sizes > 0, steps, 0)
    return epochs * -(-sizes // batch_size)


def round_up(count: int) -> int:
    """The next size on the ladder of padded step counts."""
    return next(rung for rung in _LADDER if rung >= count)


def buckets(
    partition: Partition,
    clients: Sequence[int] | np.ndarray,
    *,
    seed: int,
    round_number: int,
    epochs: int,
    batch_size: int,
    steps: int | None = None,
    limits: np.ndarray | None = None,
    most: int = 4,
) -> Iterator[Bucket]:
    """Schedules of ``clients``, grouped by steps so that little is padded. Empty clients are left out: they have nothing to do.

    Args:
      partition: who holds what.
      clients: who takes part; sorted here, so that the order of sums is fixed.
      seed: of the orders of examples.
      round_number: of the round.
      epochs: passes over a client's data.
      batch_size: B.
      steps: this many full batches for everybody instead, going round the data as often as needed.
      limits: most steps that each of ``clients`` manages (stragglers' partial work); None: all.
      most: number of groups; fewer where clients are few, as each group is a program to compile.

    Raises:
      ValueError: for epochs, batch_size, steps or most below 1.
    """
    _check_positive(epochs=epochs, batch_size=batch_size, steps=steps, most=most)
    chosen = np.asarray(clients, np.int64)
    order = np.argsort(chosen)
    chosen = chosen[order]
    counts = steps_of(partition.sizes[chosen].astype(np.int64), epochs, batch_size, steps)
    if limits is not None:
        counts = np.minimum(counts, np.asarray(limits)[order])
    chosen, counts = chosen[counts > 0], counts[counts > 0]
    for low, high in _groups(counts, min(most, 1 + len(chosen) // 32)):
        inside = (counts > low) & (counts <= high)
        yield _schedule(
            partition,
            chosen[inside],
            counts[inside],
            round_up(int(high)),
            seed=seed,
            round_number=round_number,
            batch_size=batch_size,
            wrap=steps is not None,
        )


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")


def _groups(counts: np.ndarray, most: int) -> list[tuple[int, int]]:
    """At most ``most`` intervals (low, high] of step counts with the fewest padded steps, by dynamic programming over the rungs."""
    if not len(counts):
        return []
    rungs = np.array(_LADDER)
    used = np.unique(np.searchsorted(rungs, counts))
    number = np.array([(np.searchsorted(rungs, counts) == r).sum() for r in used])
    cost = {(-1, 0): 0}  # (last rung of the groups so far, how many groups) -> executed steps
    chosen: dict[tuple[int, int], tuple[int, int]] = {}
    for end in range(len(used)):
        for begin in range(-1, end):
            for groups in range(most):
                if (begin, groups) not in cost:
                    continue
                steps = cost[begin, groups] + number[begin + 1 : end + 1].sum() * rungs[used[end]]
                if steps < cost.get((end, groups + 1), np.inf):
                    cost[end, groups + 1] = steps
                    chosen[end, groups + 1] = (begin, groups)
    last = len(used) - 1
    at = min((cost[last, g], g) for g in range(1, most + 1) if (last, g) in cost)[1]
    found, state = [], (last, at)
    while state[0] >= 0:
        before = chosen[state]
        low = 0 if before[0] < 0 else rungs[used[before[0]]]
        found.append((int(low), int(rungs[used[state[0]]])))
        state = before
    return found[::-1]


def _schedule(
    partition: Partition,
    clients: np.ndarray,
    counts: np.ndarray,
    padded: int,
    *,
    seed: int,
    round_number: int,
    batch_size: int,
    wrap: bool,
) -> Bucket:
    """Index and mask of clients with ``counts`` steps each, padded to ``padded`` steps."""
    sizes = partition.sizes[clients].astype(np.int64)
    # Positions per epoch: whole batches, the last one short; going round, batches cross epochs and none is short.
    per_epoch = sizes if wrap else -(-sizes // batch_size) * batch_size
    slots = np.arange(padded * batch_size)
    epoch, position = np.divmod(slots[None, :], per_epoch[:, None])
    live = (slots[None, :] < counts[:, None] * batch_size) & (position < sizes[:, None])
    epoch, position = np.where(live, epoch, 0), np.where(live, position, 0)
    within = np.empty_like(position)
    for rows in _alike(sizes, len(slots)):
        order = _orders(sizes[rows], int(epoch[rows].max()) + 1, seed, round_number, clients[rows])
        within[rows] = order[np.arange(len(rows))[:, None], epoch[rows], position[rows]]
    index = partition.flat[partition.offsets[clients][:, None] + within]
    shape = (len(clients), padded, batch_size)
    return Bucket(
        clients.astype(np.int32),
        index.astype(np.int32).reshape(shape),
        live.reshape(shape),
    )


def _alike(sizes: np.ndarray, slots: int) -> Iterator[np.ndarray]:
    """Rows of clients whose sizes differ by less than a factor of two, so few that their orders over ``slots`` examples stay small.

    Together with one that has 500, a client of one example that goes 800 times round would get 800 x 500 numbers.
    """
    powers = np.frexp(sizes.astype(np.float64))[1]  # size in [2 ** (power - 1), 2 ** power)
    for power in np.unique(powers).tolist():
        rows = np.flatnonzero(powers == power)
        # Epochs (at most slots / 2 ** (power - 1) + 1) times the largest size.
        few = max(1, _MOST_DRAWN // (2 * slots + 2**power))
        for at in range(0, len(rows), few):
            yield rows[at : at + few]


def _orders(
    sizes: np.ndarray, epochs: int, seed: int, round_number: int, clients: np.ndarray
) -> np.ndarray:
    """A permutation of each client's examples for each epoch, [K, epochs, largest size]; beyond a client's size: unused numbers."""
    largest = int(sizes.max())
    base = _mix(np.array([seed & (2**64 - 1)], np.uint64))
    base = _mix(base + np.uint64(round_number + 1))
    each = _mix(base + _GOLDEN * (clients.astype(np.uint64) + np.uint64(1)))
    each = _mix(each[:, None] + _GOLDEN * np.arange(1, epochs + 1, dtype=np.uint64))
    drawn = _mix(each[..., None] + _GOLDEN * np.arange(1, largest + 1, dtype=np.uint64))
    drawn[np.broadcast_to((np.arange(largest) >= sizes[:, None])[:, None, :], drawn.shape)] = (
        np.uint64(2**64 - 1)
    )
    return np.argsort(drawn, axis=-1, kind="stable")


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""EPLB: which experts get copies, and which rank each copy goes to, vectorised over layers.

``eplb`` is DeepSeek's algorithm (github.com/deepseek-ai/EPLB) result by result. ``spread`` packs as it does, but never puts two
copies of an expert on one rank, so that losing a rank costs each expert at most one copy.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped


def pack(
    weight: Float[np.ndarray, "B n"], bins: int
) -> tuple[Int[np.ndarray, "B n"], Int[np.ndarray, "B n"]]:
    """Balanced packing: n items into bins of n / bins items each, the heaviest first into the lightest bin with room.

    Returns:
      Each item's bin and its position there, int64 [B, n].
    """
    batch, items = weight.shape
    size = items // bins
    if size == 1:
        numbers = np.broadcast_to(np.arange(items), weight.shape)
        return numbers.copy(), np.zeros_like(numbers)
    order = np.argsort(-weight, axis=-1, kind="stable")
    which, position = np.empty_like(order), np.empty_like(order)
    load, filled = np.zeros((batch, bins)), np.zeros((batch, bins), np.int64)
    rows = np.arange(batch)
    for item in order.T:
        target = load.argmin(-1)
        which[rows, item], position[rows, item] = target, filled[rows, target]
        filled[rows, target] += 1
        load[rows, target] += weight[rows, item]
        load[rows, target] = np.where(filled[rows, target] == size, np.inf, load[rows, target])
    return which, position


def replicate(
    weight: Float[np.ndarray, "B n"], copies: int, *, least: int = 1, most: int | None = None
) -> tuple[Int[np.ndarray, "B c"], Int[np.ndarray, "B c"], Int[np.ndarray, "B n"]]:
    """Hands out copies: ``least`` to every item, the rest one at a time to the item with the most load per copy.

    Args:
      weight: load of each item, >= 0.
      copies: in all, from least * n to most * n.
      least: copies that every item has.
      most: copies that an item may have; default any number.

    Returns:
      item: [B, copies] the item of each copy, ``least`` rounds of all items first.
      number: [B, copies] how many copies of its item came before it.
      counts: [B, n] copies of each item.
    """
    batch, items = weight.shape
    item = np.empty((batch, copies), np.int64)
    number = np.empty_like(item)
    item[:, : least * items] = np.tile(np.arange(items), least)
    number[:, : least * items] = np.repeat(np.arange(least), items)
    counts = np.full((batch, items), least)
    share = weight / least if most is None or least < most else np.full(weight.shape, -1.0)
    rows = np.arange(batch)
    for copy in range(least * items, copies):
        hot = share.argmax(-1)
        item[:, copy], number[:, copy] = hot, counts[rows, hot]
        counts[rows, hot] += 1
        now = weight[rows, hot] / counts[rows, hot]
        share[rows, hot] = now if most is None else np.where(counts[rows, hot] < most, now, -1.0)
    return item, number, counts


def eplb(
    load: Shaped[np.ndarray, "L E"],
    slots: int,
    *,
    groups: int = 1,
    nodes: int = 1,
    ranks: int = 1,
) -> Int[np.ndarray, "L P"]:
    """DeepSeek's expert parallelism load balancer: the expert of each slot, int32 [layers, slots].

    Hierarchical if ``nodes`` divides ``groups`` (groups of experts go to nodes first), else global. It looks neither at which
    ranks are alive nor at whether an expert's copies share a rank; ``rebalance`` does.

    Args:
      load: tokens, or any measure of load, per layer and expert.
      slots: in all; slots r * slots / ranks onwards belong to rank r.
      groups: of consecutive experts, that should stay within a node.
      nodes: of ranks / nodes consecutive ranks each.
      ranks: that share the slots evenly.

    Raises:
      ValueError: if a number does not divide the one it must, or there are fewer slots than experts.
    """
    layers, experts = load.shape
    if nodes < 1 or groups < 1 or groups % nodes:
        groups = nodes_used = 1
    else:
        nodes_used = nodes
    _check_divides("ranks", ranks, "slots", slots)
    _check_divides("groups", groups, "experts", experts)
    _check_divides("nodes", nodes_used, "ranks", ranks)
    if slots < experts:
        raise ValueError(f"slots must be at least the {experts} experts; got {slots}.")
    load = load.astype(np.float64)
    size = experts // groups
    # 1. Groups to nodes: an order of experts in which those of a node are together.
    node, position = pack(load.reshape(layers, groups, size).sum(-1), nodes_used)
    place = node * (groups // nodes_used) + position
    new = (place[..., None] * size + np.arange(size)).reshape(layers, experts)
    original = np.argsort(new, axis=-1)
    # 2. Copies within each node.
    local = np.take_along_axis(load, original, -1).reshape(layers * nodes_used, -1)
    copy, _, counts = replicate(local, slots // nodes_used)
    # 3. A node's copies to its ranks.
    share = np.take_along_axis(local / counts, copy, -1)
    rank, position = pack(share, ranks // nodes_used)
    slot = rank * (slots // ranks) + position
    arranged = np.empty_like(copy)
    np.put_along_axis(arranged, slot, copy, -1)
    # 4. Back to the experts' own numbers.
    first = (np.arange(nodes_used) * (experts // nodes_used))[:, None]
    arranged = arranged.reshape(layers, nodes_used, -1) + first
    return np.take_along_axis(original, arranged.reshape(layers, slots), -1).astype(np.int32)


def _check_divides(name: str, value: int, of_name: str, of: int) -> None:
    if value < 1 or of % value:
        raise ValueError(f"{name} must divide {of_name} ({of}); got {value}.")


def spread(
    load: Float[np.ndarray, "L E"], ranks: int, slots_per_rank: int, least: int
) -> Int[np.ndarray, "L P"]:
    """The expert of each slot, no two copies of one on a rank: int32 [layers, ranks * slots_per_rank], -1 for an empty slot.

    Slots stay empty only when every rank holds every expert.

    Args:
      load: per layer and expert, >= 0.
      ranks: that take part.
      slots_per_rank: of each.
      least: copies of every expert; at most ``ranks``, and least * experts at most ranks * slots_per_rank.
    """
    copies = min(ranks * slots_per_rank, ranks * load.shape[1])
    expert, _, counts = replicate(load, copies, least=least, most=ranks)
    return _Packing(load / counts, expert, ranks, slots_per_rank).run()


class _Packing:
    """Copies to ranks, heaviest first, each to the lightest rank that has room and not yet a copy of the same expert.

    Args:
      share: [L, E] load of a copy of each expert.
      expert: [L, c] the expert of each copy; at most ``ranks`` copies of each.
      ranks: how many there are.
      size: slots of each.
    """

    def __init__(self, share: np.ndarray, expert: np.ndarray, ranks: int, size: int):
        weight = np.take_along_axis(share, expert, -1)
        order = np.lexsort((expert, -weight), axis=-1)  # an expert's copies come one after another
        self.share, self.size = share, size
        self.copies = np.take_along_axis(expert, order, -1)
        self.table = np.full((len(share), ranks, size), -1, np.int32)
        self.load = np.zeros((len(share), ranks))
        self.filled = np.zeros((len(share), ranks), np.int64)
        self.full = np.zeros((len(share), ranks), bool)

    def run(self) -> np.ndarray:
        rows = np.arange(len(self.share))
        holds = np.zeros_like(self.full)  # ranks that hold the expert whose turn it is
        last = np.full(len(rows), -1)
        for expert in self.copies.T:
            holds[expert != last] = False
            last = expert
            cost = np.where(self.full | holds, np.inf, self.load)
            rank = cost.argmin(-1)
            for row in np.flatnonzero(np.isinf(cost[rows, rank])):
                rank[row] = self._make_room(int(row), int(expert[row]), holds[row])
            holds[rows, rank] = True
            self.table[rows, rank, self.filled[rows, rank]] = expert
            self.load[rows, rank] += self.share[rows, expert]
            self.filled[rows, rank] += 1
            self.full[rows, rank] = self.filled[rows, rank] == self.size
        return self.table.reshape(len(rows), -1)

    def _make_room(self, row: int, expert: int, holds: np.ndarray) -> int:
        """Frees a slot on a rank without the expert, when all ranks with room hold it: one of its experts moves to one of those.

        There always is one: a full rank without the expert holds more others than a rank with room that has it.
        """
        table, load, share = self.table[row], self.load[row], self.share[row]
        roomy = int(np.where(self.full[row], np.inf, load).argmin())
        movable = (self.full[row] & ~holds)[:, None] & ~np.isin(table, table[roomy])
        moved = share[table]
        peak = np.maximum(load[roomy] + moved, load[:, None] - moved + share[expert])
        rank, position = np.unravel_index(np.where(movable, peak, np.inf).argmin(), table.shape)
        other = table[rank, position]
        table[roomy, self.filled[row, roomy]] = other
        self.filled[row, roomy] += 1
        self.full[row, roomy] = self.filled[row, roomy] == self.size
        load[roomy] += share[other]
        # Close the gap: the caller appends at the end.
        table[rank, position:-1] = table[rank, position + 1 :]
        table[rank, -1] = -1
        load[rank] -= share[other]
        self.filled[row, rank] -= 1
        self.full[row, rank] = False
        return int(rank)

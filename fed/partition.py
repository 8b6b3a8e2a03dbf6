"""Who holds which examples (spec 6.1): indices per client, and the statistics that every result must be read with.

Alpha values of different code bases are not comparable, because rules about small and unbalanced clients differ. So the realised
histogram of labels is part of every report.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Labels = Int[np.ndarray, " N"]
_REDRAWS = 10


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a partition came out as.

    Attributes:
      clients: how many.
      sizes: examples per client [N].
      histogram: examples per client and class [N, C].
      classes_held: mean number of classes that a client with data has.
      distance: mean total variation distance between a client's labels and everybody's: 0 for equal, near 1 for disjoint.
    """

    clients: int
    sizes: np.ndarray
    histogram: np.ndarray
    classes_held: float
    distance: float

    def __str__(self) -> str:
        quartiles = np.percentile(self.sizes, [0, 25, 50, 75, 100]).round().astype(int)
        single = int(((self.histogram > 0).sum(1) == 1).sum())
        return (
            f"{self.clients} clients, {self.sizes.sum():,} examples; sizes min {quartiles[0]}, quartiles "
            f"{quartiles[1]} {quartiles[2]} {quartiles[3]}, max {quartiles[4]}; classes per client {self.classes_held:.1f} of "
            f"{self.histogram.shape[1]}; single-class {single}, empty {int((self.sizes == 0).sum())}; "
            f"distance from the whole {self.distance:.2f}"
        )


class Partition(Sequence[np.ndarray]):
    """Indices of each client's examples, a sequence of sorted int arrays. No example has two owners.

    Args:
      indices: per client.
      total: examples in the data set; indices must lie below.
      rule: how it was made, for reports.

    Raises:
      ValueError: if an index is out of range or belongs to two clients.
    """

    def __init__(self, indices: Sequence[np.ndarray], total: int, rule: str):
        self._indices = tuple(np.sort(np.asarray(part, np.int32)) for part in indices)
        self.total, self.rule = total, rule
        self.sizes = np.array([len(part) for part in self._indices], np.int32)
        self.flat = np.concatenate(self._indices) if self._indices else np.zeros(0, np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        if self.flat.size and not 0 <= self.flat.min() <= self.flat.max() < total:
            raise ValueError(
                f"indices must lie in [0, {total}); got {self.flat.min()} to {self.flat.max()}."
            )
        counts = np.bincount(self.flat, minlength=total)
        if (counts > 1).any():
            example = int(np.argmax(counts > 1))
            owners = [k for k, part in enumerate(self._indices) if example in part]
            raise ValueError(
                f"an example must belong to one client; {example} belongs to {owners}; partition without replacement."
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, client):
        return self._indices[client]

    def __repr__(self) -> str:
        return f"Partition({self.rule}: {len(self)} clients, {len(self.flat):,} of {self.total:,} examples)"

    def statistics(self, labels: np.ndarray, classes: int | None = None) -> Statistics:
        """The realised split of ``labels`` (of sequences: all their tokens)."""
        classes = int(labels.max()) + 1 if classes is None else classes
        rows = [np.bincount(labels[part].reshape(-1), minlength=classes) for part in self]
        histogram = np.stack(rows) if rows else np.zeros((0, classes), np.int64)
        held = histogram[histogram.sum(1) > 0]
        whole = histogram.sum(0) / max(histogram.sum(), 1)
        shares = held / np.maximum(held.sum(1, keepdims=True), 1)
        return Statistics(
            len(self),
            self.sizes,
            histogram,
            float((held > 0).sum(1).mean()) if len(held) else 0.0,
            float(0.5 * np.abs(shares - whole).sum(1).mean()) if len(held) else 0.0,
        )


def iid(total: int | np.ndarray, clients: int, seed: int) -> Partition:
    """Equal parts of a shuffle; sizes differ by one at most. ``total``: number of examples, or their labels."""
    count = total if isinstance(total, int) else len(total)
    _check(clients, count)
    order = _generator(seed, "iid").permutation(count)
    return Partition(np.array_split(order, clients), count, "iid")


def dirichlet(
    labels: Labels,
    clients: int,
    alpha: float,
    seed: int,
    *,
    minimum: int = 1,
    balance: bool = False,
) -> Partition:
    """Label skew: of each class, every client gets a share drawn from Dir(alpha).

    Args:
      labels: of all examples.
      clients: how many.
      alpha: concentration; 0.1 leaves a client few classes, 100 is nearly IID.
      seed: of the draw.
      minimum: smallest size of a client; the whole draw is repeated up to 10 times, then refused. 0 allows empty clients.
      balance: gives no more of a class to a client that already has an average client's size (as Flower Datasets' option does).

    Raises:
      ValueError: if alpha is not positive, or 10 draws all left some client below ``minimum``.
    """
    _check(clients, len(labels))
    if not alpha > 0:
        raise ValueError(f"alpha must be positive; got {alpha}; for equal shares use iid.")
    generator = _generator(seed, "dirichlet")
    smallest = 0
    for _ in range(_REDRAWS):
        parts = _draw(labels, clients, alpha, generator, balance)
        smallest = max(smallest, min(map(len, parts)))
        if min(map(len, parts)) >= minimum:
            return Partition(parts, len(labels), f"dirichlet(alpha={alpha:g})")
    raise ValueError(
        f"every client must have minimum={minimum} examples; the smallest client of the best of {_REDRAWS} draws with "
        f"alpha={alpha:g} has {smallest}; raise alpha, or lower clients or minimum."
    )


def _draw(
    labels: Labels, clients: int, alpha: float, generator: np.random.Generator, balance: bool
) -> list[np.ndarray]:
    """One Dirichlet draw: the examples of every client."""
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    sizes = np.zeros(clients)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares: Float[np.ndarray, " N"] = generator.dirichlet(np.full(clients, alpha))
        if balance:
            shares = shares * (sizes < len(labels) / clients)
        # With tiny alpha the draw can underflow to zeros everywhere that balancing left open.
        shares = shares / shares.sum() if shares.sum() > 0 else np.full(clients, 1 / clients)
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for client, part in enumerate(np.split(members, cuts)):
            parts[client].append(part)
            sizes[client] += len(part)
    return [np.concatenate(part) for part in parts]


def shards(labels: Labels, clients: int, classes_per_client: int, seed: int) -> Partition:
    """Pathological skew: examples sorted by label, cut into equal shards, ``classes_per_client`` of them to each client.

    A shard that spans the border of two classes has both, as in the original procedure (McMahan et al., 2017).

    Args:
      labels: of all examples.
      clients: how many.
      classes_per_client: shards of each.
      seed: of the deal.

    Raises:
      ValueError: for more shards than examples, or none.
    """
    _check(clients, len(labels))
    pieces = clients * classes_per_client
    if not 1 <= pieces <= len(labels):
        raise ValueError(
            f"clients x classes_per_client must lie in [1, {len(labels)}], the number of examples; got {clients} x "
            f"{classes_per_client}."
        )
    generator = _generator(seed, "shards")
    order = np.argsort(labels + generator.random(len(labels)) * 0.5, kind="stable")
    cut = np.array_split(order, pieces)
    deal = generator.permutation(pieces).reshape(clients, classes_per_client)
    parts = [np.concatenate([cut[piece] for piece in row]) for row in deal]
    return Partition(parts, len(labels), f"shards({classes_per_client} per client)")


def quantity(
    total: int | np.ndarray,
    clients: int,
    seed: int,
    *,
    law: str = "lognormal",
    spread: float = 1.0,
    minimum: int = 1,
) -> Partition:
    """Quantity skew: IID labels, sizes from a heavy-tailed law.

    Args:
      total: number of examples, or their labels.
      clients: how many.
      seed: of sizes and shuffle.
      law: "lognormal" (``spread`` is sigma) or "zipf" (size proportional to rank ** -spread).
      spread: 0 gives equal sizes.
      minimum: examples that every client has at least.

    Raises:
      ValueError: for another law, a spread that is negative or not finite, and a minimum that is negative or that there are not enough
        examples for.
    """
    count = total if isinstance(total, int) else len(total)
    _check(clients, count)
    if not 0 <= minimum * clients <= count:
        raise ValueError(
            f"minimum x clients must lie in [0, {count}]; got {minimum} x {clients}; lower one of them."
        )
    if not 0 <= spread < float("inf"):
        raise ValueError(f"spread must be finite and not negative; got {spread}; 0 is equal sizes.")
    generator = _generator(seed, "quantity")
    if law == "lognormal":
        weights = generator.lognormal(0.0, spread, clients)
    elif law == "zipf":
        weights = generator.permutation(np.arange(1, clients + 1) ** -float(spread))
    else:
        raise ValueError(f"law must be lognormal or zipf; got {law!r}.")
    free = count - minimum * clients
    cuts = np.round(np.cumsum(weights / weights.sum()) * free).astype(int)
    sizes = np.diff(np.concatenate([[0], cuts])) + minimum
    order = generator.permutation(count)
    return Partition(
        np.split(order, np.cumsum(sizes)[:-1]), count, f"quantity({law}, spread={spread:g})"
    )


def natural(
    owners: np.ndarray | None, *, minimum: int = 1, clients: int | None = None
) -> Partition:
    """One client per owner (speaker, file, writer).

    Args:
      owners: whose each example is [N].
      minimum: owners with fewer examples are left out.
      clients: at most this many, the largest first.

    Raises:
      ValueError: for data without owners, clients below 1, and a minimum that no owner reaches.
    """
    if clients is not None and clients < 1:
        raise ValueError(f"clients must be at least 1, or None for all; got {clients}.")
    if owners is None:
        raise ValueError("owners must say whose each example is; this data set has none.")
    names, counts = np.unique(owners, return_counts=True)
    kept = names[counts >= minimum]
    if clients is not None:
        largest = np.argsort(-counts[counts >= minimum], kind="stable")[:clients]
        kept = kept[np.sort(largest)]
    if not len(kept):
        raise ValueError(
            f"minimum must leave an owner; got {minimum}, and the largest has {counts.max()}."
        )
    return Partition([np.flatnonzero(owners == k) for k in kept], len(owners), "natural")


def _generator(seed: int, rule: str) -> np.random.Generator:
    return np.random.default_rng([seed, *rule.encode()])


def _check(clients: int, examples: int) -> None:
    if not 1 <= clients <= examples:
        raise ValueError(
            f"clients must lie in [1, {examples}], the number of examples; got {clients}."
        )

"""How the server combines updates: weighted mean, and what withstands some wrong clients (median, trimmed mean, Krum)."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fed.models import Params


@runtime_checkable
class Aggregator(Protocol):
    """Combines the accepted updates of one architecture. Hashable.

    Attributes:
      individual: whether the server sees each update (secure aggregation: it does not, so nothing that needs members may follow).

    One that needs more than one update has an attribute ``minimum_replies`` besides, and one with limits of its own a method
    ``check_clients``: see the functions of those names.
    """

    individual: bool

    def combine(
        self, updates: Params, weights: Float[Array, " K"], clients: Int[Array, " K"], key: Array
    ) -> Params:
        """One update from updates stacked [K, ...]; all are finite and all weights positive."""
        ...


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean weighted by examples. The engine sums inside its chunks and never calls ``combine`` where only this is needed."""

    individual: bool = True

    def combine(
        self, updates: Params, weights: Float[Array, " K"], clients: Int[Array, " K"], key: Array
    ) -> Params:
        """The weighted mean."""
        share = weights / jnp.sum(weights)
        return jax.tree.map(lambda u: jnp.tensordot(share.astype(u.dtype), u, axes=1), updates)


@dataclasses.dataclass(frozen=True)
class Median:
    """The median of each coordinate, unweighted (Yin et al., 2018)."""

    individual: bool = True

    def combine(
        self, updates: Params, weights: Float[Array, " K"], clients: Int[Array, " K"], key: Array
    ) -> Params:
        """The coordinate-wise median."""
        return jax.tree.map(lambda u: jnp.median(u, axis=0), updates)


@dataclasses.dataclass(frozen=True)
class TrimmedMean:
    """The mean of each coordinate without its ``share`` largest and as many smallest values, unweighted (Yin et al., 2018)."""

    share: float = 0.1
    individual: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise ValueError(
                f"share must lie in [0, 0.5), it is cut on both sides; got {self.share}."
            )

    def combine(
        self, updates: Params, weights: Float[Array, " K"], clients: Int[Array, " K"], key: Array
    ) -> Params:
        """The coordinate-wise trimmed mean."""
        count = weights.shape[0]
        cut = min(int(-(-self.share * count // 1)), (count - 1) // 2)
        return jax.tree.map(
            lambda u: jnp.mean(jnp.sort(u, axis=0)[cut : count - cut], axis=0), updates
        )


@dataclasses.dataclass(frozen=True)
class Krum:
    """The mean of the ``keep`` updates that are closest to their neighbours (Blanchard et al., 2017; keep > 1 is Multi-Krum).

    Attributes:
      malicious: how many wrong clients are expected.
      keep: how many updates are averaged.
    """

    malicious: int = 1
    keep: int = 1
    individual: bool = True

    def __post_init__(self) -> None:
        if self.malicious < 0 or self.keep < 1:
            raise ValueError(
                f"malicious must be at least 0 and keep at least 1; got {self.malicious} and {self.keep}."
            )

    @property
    def minimum_replies(self) -> int:
        """What the guarantee needs, K >= malicious + 3, and as many as are kept."""
        return max(self.malicious + 3, self.keep)

    def combine(
        self, updates: Params, weights: Float[Array, " K"], clients: Int[Array, " K"], key: Array
    ) -> Params:
        """The mean of the chosen updates.

        Raises:
          ValueError: for fewer than ``minimum_replies`` updates; a run skips such a round.
        """
        count = weights.shape[0]
        if count < self.minimum_replies:
            raise ValueError(
                f"Krum needs at least malicious + 3 = {self.malicious + 3} replies and keep={self.keep} among them; got "
                f"{count}; raise the quorum or lower malicious."
            )
        neighbours = count - self.malicious - 2
        flat = jnp.concatenate(
            [u.reshape(count, -1).astype(jnp.float32) for u in jax.tree.leaves(updates)], axis=1
        )
        squares = jnp.sum(flat * flat, axis=1)
        distances = squares[:, None] + squares[None, :] - 2 * flat @ flat.T
        distances = jnp.where(jnp.eye(count, dtype=bool), jnp.inf, distances)
        scores = jnp.sum(jnp.sort(distances, axis=1)[:, :neighbours], axis=1)
        chosen = jnp.argsort(scores)[: self.keep]
        return jax.tree.map(lambda u: jnp.mean(u[chosen], axis=0), updates)


def minimum_replies(aggregator: Aggregator) -> int:
    """The fewest updates of one architecture that ``aggregator`` combines."""
    return getattr(aggregator, "minimum_replies", 1)


def check_clients(aggregator: Aggregator, sizes: np.ndarray, most: int) -> None:
    """Refuses, before anybody trains, clients that ``aggregator`` could not combine.

    Args:
      aggregator: of the run.
      sizes: examples of all clients, int [N].
      most: clients of one architecture that may reply in a round.

    Raises:
      ValueError: for fewer clients than it needs; for secure aggregation, one with too many examples (named) or too many clients.
    """
    name, least = type(aggregator).__name__, minimum_replies(aggregator)
    if most < least:
        raise ValueError(
            f"{name} needs {least} replies of an architecture; got at most {most} per round; raise participation or clients."
        )
    if hasattr(aggregator, "check_clients"):
        aggregator.check_clients(sizes, most)


def by_name(name: str) -> Aggregator:
    """An aggregator as the command line names it.

    Args:
      name: mean, median, trimmed[:SHARE], krum[:MALICIOUS[:KEEP]], secure, or private:CLIP:NOISE:EXPECTED.

    Raises:
      ValueError: for another name, and for numbers that are none or out of range.
    """
    from fed.privacy import GaussianMean
    from fed.secure_aggregation import SecureMean

    kind, *values = name.split(":")
    try:
        if kind == "mean" and not values:
            return Mean()
        if kind == "median" and not values:
            return Median()
        if kind == "trimmed" and len(values) <= 1:
            return TrimmedMean(*map(float, values))
        if kind == "krum" and len(values) <= 2:
            return Krum(*map(int, values))
        if kind == "secure" and not values:
            return SecureMean()
        if kind == "private" and len(values) == 3:
            return GaussianMean(*map(float, values))
    except ValueError as error:
        raise ValueError(f"aggregator {name!r} has a wrong number: {error}") from error
    raise ValueError(
        "aggregator must be mean, median, trimmed[:SHARE], krum[:MALICIOUS[:KEEP]], secure or private:CLIP:NOISE:EXPECTED; got "
        f"{name!r}."
    )

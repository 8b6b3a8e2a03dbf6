"""What happens to a client's update between its training and the server's sum: hooks for compression, clipping and attacks."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fed.models import Params


@runtime_checkable
class Upload(Protocol):
    """A transformation of updates (trained minus received parameters). Hashable, as it is static under jit."""

    def apply(self, update: Params, client: Int[Array, ""], key: Array) -> Params:
        """What the server receives after decoding; traced, under vmap over clients."""
        ...

    def nbytes(self, shapes: Params) -> int:
        """Exact bytes on the wire of one update of these shapes and dtypes."""
        ...


def dense_bytes(shapes: Params) -> int:
    """Bytes of arrays sent as they are."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@dataclasses.dataclass(frozen=True)
class Attack:
    """Clients that send something else than they learned; for showing what robust aggregation withstands.

    Attributes:
      clients: who attacks.
      kind: sign (the update's negative times ``strength``), noise (normal numbers of that size), nan, zero.
      strength: factor.
    """

    clients: tuple[int, ...]
    kind: str = "sign"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("sign", "noise", "nan", "zero"):
            raise ValueError(f"kind must be sign, noise, nan or zero; got {self.kind!r}.")

    def apply(self, update: Params, client: Int[Array, ""], key: Array) -> Params:
        """The update that is sent."""
        bad = jnp.any(jnp.asarray(self.clients, jnp.int32) == client)
        leaves, structure = jax.tree.flatten(update)
        sent = []
        for leaf, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            wrong = {
                "sign": lambda x, k: -self.strength * x,
                "noise": lambda x, k: self.strength * jax.random.normal(k, x.shape, x.dtype),
                "nan": lambda x, k: jnp.full_like(x, jnp.nan),
                "zero": lambda x, k: jnp.zeros_like(x),
            }[self.kind](leaf, k)
            sent.append(jnp.where(bad, wrong, leaf))
        return jax.tree.unflatten(structure, sent)

    def nbytes(self, shapes: Params) -> int:
        """As an honest client's."""
        return dense_bytes(shapes)


def upload_bytes(uploads: tuple[Upload, ...], shapes: Params) -> int:
    """Bytes of one update on the wire: what the last hook says (it is the one that encodes)."""
    honest = [hook for hook in uploads if not isinstance(hook, Attack)]
    return honest[-1].nbytes(shapes) if honest else dense_bytes(shapes)

"""Secure aggregation: the server learns the weighted sum of the clients' small models and no single one (Bonawitz et al., CCS 2017).

Each pair of clients agrees on a mask that one adds and the other subtracts, so that masks cancel in the sum; each client adds another mask of its
own. Shares of what makes the masks lie with the other clients: when one drops out after it was counted on, ``threshold`` of
those that are left give back what removes its masks. Of any client the server gets either the shares of its pairwise key (it dropped) or
of its own mask (it arrived), never both. Sums are modulo 2^32 of quantised numbers, hence exact, in any order.

Four stages, as of Flower's SecAgg+: advertise keys, share, collect masked vectors, unmask. Keys are made anew every round. Key agreement (X25519,
HKDF), the generator of masks (ChaCha20) and sealing of shares (ChaCha20-Poly1305) are ``cryptography``'s, Shamir's sharing is
``pycryptodome``'s; nothing here invents a primitive. The server is taken as honest but curious: it follows the stages.

Homogeneous mode only: a heterogeneous ensemble needs each member's own outputs, and so does any rule that looks at single updates
(median, trimmed mean, Krum). ``SecureMean`` is a run's aggregator; ``fed.Driver`` refuses it with a method that reads single models.
"""

import dataclasses
import secrets
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from fed.errors import need
from jaxmoe.errors import JaxMoeError

MODULUS_BITS = 32
_LARGEST = 2 ** (MODULUS_BITS - 1) - 1  # of a sum
_LEAST = 3  # clients in a sum
_SEED_BYTES = 32
_HALF = 16  # bytes of one secret of pycryptodome's Shamir


class QuorumNotMet(JaxMoeError):
    """Fewer clients are left than the round needs; it is to be skipped, nothing has changed."""


def _library(name: str) -> Any:
    return need(name, "fed")


@dataclasses.dataclass(frozen=True)
class SecureConfig:
    """Numbers that all parties agree on before a round.

    Attributes:
      threshold: of the clients that shared keys, the least fraction (above 1/2, at most 1) that must stay until the end; never fewer
        than three, as of two each learns the other's update from the sum.
      clip: values of an update are limited to [-clip, clip]; in the units of the update.
      levels: steps between -clip and clip (Flower: 2^22).
      weight_limit: the largest weight of a client (its number of examples); larger ones are refused. The larger it is, the fewer clients'
        sums fit (``most_clients``), and the coarser are the steps of those with few examples.

    Raises:
      ValueError: for numbers out of range.
    """

    threshold: float = 2 / 3
    clip: float = 8.0
    levels: int = 2**22
    weight_limit: int = 1000

    def __post_init__(self):
        if not 0.5 < self.threshold <= 1:
            raise ValueError(
                f"threshold must be above 1/2, so that two groups cannot unmask differently, and at most 1; got {self.threshold}."
            )
        if not self.clip > 0 or self.weight_limit < 1:
            raise ValueError(
                f"clip and weight_limit must be positive; got {self.clip} and {self.weight_limit}."
            )
        if not 2 <= self.levels <= 2 ** (MODULUS_BITS - 2):
            raise ValueError(
                f"levels must be from 2 to 2^{MODULUS_BITS - 2}; got {self.levels}. Flower takes 2^22."
            )
        if self.most_clients() < _LEAST:
            raise ValueError(
                f"weight_limit must be at most {_LARGEST // _LEAST}, so that the weights of {_LEAST} clients add up within 32 bits; got "
                f"{self.weight_limit}. Count examples in tens or hundreds."
            )

    def most_clients(self) -> int:
        """How many clients' sums fit into 32 bits, with their signs: of values, and of weights."""
        return min(2**MODULUS_BITS // self.levels - 1, _LARGEST // self.weight_limit)

    def needed(self, clients: int) -> int:
        """How many of ``clients`` must stay."""
        return max(_LEAST, int(np.ceil(self.threshold * clients)))


# -- numbers ---------------------------------------------------------------------------------------


def quantize(values: np.ndarray, weight: int, config: SecureConfig) -> np.ndarray:
    """Clipped ``values * weight / weight_limit`` in steps of ``2 clip / levels``, with the weight behind them.

    Args:
      values: float [n], finite.
      weight: from 0 to ``weight_limit``.
      config: the round's.

    Returns:
      int64 [n + 1].

    Raises:
      ValueError: for a weight out of range, NaN or infinity.
    """
    if not 0 <= weight <= config.weight_limit:
        raise ValueError(
            f"weight must be from 0 to weight_limit={config.weight_limit}; got {weight}. Raise the limit for all clients."
        )
    if not np.isfinite(values).all():
        raise ValueError("an update has NaN or infinity; the client must not take part.")
    clipped = np.clip(np.asarray(values, np.float64), -config.clip, config.clip)
    steps = np.rint(clipped * (weight / config.weight_limit) * (config.levels / (2 * config.clip)))
    return np.append(steps, weight).astype(np.int64)


def dequantize(total: np.ndarray, config: SecureConfig) -> tuple[np.ndarray, int]:
    """(weighted mean float64 [n], total weight) from a sum of ``quantize``d vectors.

    Raises:
      QuorumNotMet: if nobody's weight is above zero.
    """
    weight = int(total[-1])
    if weight == 0:
        raise QuorumNotMet("the clients that arrived have no examples; the round is skipped.")
    scale = 2 * config.clip / config.levels * config.weight_limit / weight
    return total[:-1] * scale, weight


def _ring(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64).astype(np.uint32)  # wraps


def _signed(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint32).view(np.int32).astype(np.int64)


# -- primitives, from libraries --------------------------------------------------------------------


def _mask(seed: bytes, count: int) -> np.ndarray:
    """uint32 [count] of a ChaCha20 key stream; a seed is used once."""
    ciphers = _library("cryptography.hazmat.primitives.ciphers")
    algorithm = ciphers.algorithms.ChaCha20(seed, bytes(16))
    stream = ciphers.Cipher(algorithm, mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, "<u4")


def _agree(private: Any, public: bytes, purpose: bytes) -> bytes:
    """32 bytes that both ends of a pair compute."""
    x25519 = _library("cryptography.hazmat.primitives.asymmetric.x25519")
    hashes = _library("cryptography.hazmat.primitives.hashes")
    hkdf = _library("cryptography.hazmat.primitives.kdf.hkdf")
    secret = private.exchange(x25519.X25519PublicKey.from_public_bytes(public))
    return hkdf.HKDF(hashes.SHA256(), _SEED_BYTES, None, purpose).derive(secret)


def _split(secret: bytes, needed: int, clients: int) -> list[bytes]:
    """Shamir shares of 32 bytes; any ``needed`` of them give it back, fewer say nothing."""
    shamir = _library("Crypto.Protocol.SecretSharing").Shamir
    halves = [shamir.split(needed, clients, secret[i : i + _HALF]) for i in (0, _HALF)]
    return [a[1] + b[1] for a, b in zip(*halves, strict=True)]


def _join(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from shares by their number, counted from one."""
    shamir = _library("Crypto.Protocol.SecretSharing").Shamir
    return b"".join(
        shamir.combine([(n, share[i : i + _HALF]) for n, share in shares.items()])
        for i in (0, _HALF)
    )


# -- the parties -----------------------------------------------------------------------------------


class SecureClient:
    """One client in one round; it keeps secrets, so it is made anew every round.

    The stages in order: ``advertise``, ``share``, ``masked``, ``reveal``.
    """

    def __init__(self, client: int, config: SecureConfig = SecureConfig()):
        x25519 = _library("cryptography.hazmat.primitives.asymmetric.x25519")
        self.client, self.config = client, config
        self._mask_key = x25519.X25519PrivateKey.generate()
        self._seal_key = x25519.X25519PrivateKey.generate()
        self._own_seed = secrets.token_bytes(_SEED_BYTES)
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._sealed: dict[int, bytes] = {}

    def advertise(self) -> tuple[bytes, bytes]:
        """Public keys for masks and for sealing, 32 bytes each."""
        return tuple(k.public_key().public_bytes_raw() for k in (self._mask_key, self._seal_key))

    def share(self, keys: Mapping[int, tuple[bytes, bytes]]) -> dict[int, bytes]:
        """Sealed shares for every other client; only the receiver can open one.

        Args:
          keys: what every client advertised, this one's too.

        Raises:
          ValueError: for fewer than three clients (of two, each learns the other from the sum), more than fit into 32 bits, or if
            its own keys aren't among them.
        """
        if keys.get(self.client) != self.advertise():
            raise ValueError(
                f"keys must have those of client {self.client} itself; the server changed them."
            )
        if not _LEAST <= len(keys) <= self.config.most_clients():
            raise ValueError(
                f"secure aggregation needs from {_LEAST} to {self.config.most_clients()} clients at {self.config.levels} levels and "
                f"weight_limit={self.config.weight_limit}; got {len(keys)}. Sample more clients; for more, lower levels or weight_limit."
            )
        self._keys = dict(keys)
        order, needed = sorted(keys), self.config.needed(len(keys))
        own = _split(self._own_seed, needed, len(order))
        pairwise = _split(self._mask_key.private_bytes_raw(), needed, len(order))
        return {
            other: self._cipher(other).encrypt(
                nonce := secrets.token_bytes(12), a + b, self._label(self.client, other)
            )
            + nonce
            for other, a, b in zip(order, own, pairwise, strict=True)
        }

    def masked(self, values: np.ndarray, weight: int, sealed: Mapping[int, bytes]) -> np.ndarray:
        """The quantised update under all masks.

        Args:
          values: float [n].
          weight: whole number of examples.
          sealed: the shares that came for this client, by sender; those who sent none are left out of the masks.

        Returns:
          uint32 [n + 1].

        Raises:
          ValueError: for a weight out of range, NaN or infinity.
        """
        self._sealed = dict(sealed)
        vector = _ring(quantize(values, weight, self.config))
        vector = vector + _mask(self._own_seed, vector.size)
        for other in sorted(sealed):
            if other != self.client:
                mask = _mask(_agree(self._mask_key, self._keys[other][0], b"mask"), vector.size)
                vector = vector + mask if self.client < other else vector - mask
        return vector

    def reveal(self, arrived: Collection[int], dropped: Collection[int]) -> dict[int, bytes]:
        """Shares that remove masks: of the own mask of who arrived, of the pairwise key of who dropped.

        Raises:
          ValueError: if someone is said to be both, or is unknown, or too few arrived: then the sum could be of one client.
        """
        both, all_ = set(arrived) & set(dropped), set(arrived) | set(dropped)
        if both or all_ != set(self._sealed):
            raise ValueError(
                f"client {self.client} reveals nothing: clients {sorted(both or all_ ^ set(self._sealed))} are said to have both "
                "arrived and dropped, or are not those that shared keys."
            )
        needed = self.config.needed(len(self._keys))
        if len(arrived) < needed:
            raise ValueError(
                f"client {self.client} reveals nothing: {len(arrived)} clients arrived and {needed} are needed."
            )
        return {other: self._open(other)[0 if other in arrived else 1] for other in sorted(all_)}

    def _cipher(self, other: int) -> Any:
        aead = _library("cryptography.hazmat.primitives.ciphers.aead")
        return aead.ChaCha20Poly1305(_agree(self._seal_key, self._keys[other][1], b"seal"))

    def _open(self, other: int) -> tuple[bytes, bytes]:
        exceptions = _library("cryptography.exceptions")
        sealed, label = self._sealed[other], self._label(other, self.client)
        try:
            shares = self._cipher(other).decrypt(sealed[-12:], sealed[:-12], label)
        except exceptions.InvalidTag:
            raise ValueError(
                f"the share from client {other} for client {self.client} was altered on its way; leave client {other} out."
            ) from None
        return shares[: len(shares) // 2], shares[len(shares) // 2 :]

    @staticmethod
    def _label(sender: int, receiver: int) -> bytes:
        return f"{sender}->{receiver}".encode()


def unmask(
    masked: Mapping[int, np.ndarray],
    keys: Mapping[int, tuple[bytes, bytes]],
    sharing: Collection[int],
    revealed: Mapping[int, Mapping[int, bytes]],
    config: SecureConfig = SecureConfig(),
) -> np.ndarray:
    """The server's last stage: the exact sum of what arrived.

    Args:
      masked: uint32 [n + 1] of every client that arrived.
      keys: what everybody advertised.
      sharing: the clients that shared keys, over which masks were made.
      revealed: by the client that answered, its shares.
      config: the round's.

    Returns:
      int64 [n + 1], the sum of the arrived clients' ``quantize``d vectors.

    Raises:
      QuorumNotMet: if too few clients arrived or answered; the round is to be skipped.
      ValueError: if the shares of a dropped client don't give its key.
    """
    needed = config.needed(len(keys))
    for what, count in (("arrived", len(masked)), ("revealed shares", len(revealed))):
        if count < needed:
            raise QuorumNotMet(
                f"{count} of {len(keys)} clients {what} and secure aggregation needs {needed}; nothing can be unmasked, so the round "
                "is skipped. Lower the threshold, or sample more clients."
            )
    x25519 = _library("cryptography.hazmat.primitives.asymmetric.x25519")
    number = {client: n for n, client in enumerate(sorted(keys), 1)}
    total = np.zeros_like(next(iter(masked.values())))
    for vector in masked.values():
        total = total + vector
    for client in sorted(sharing):
        answers = {number[who]: shares[client] for who, shares in sorted(revealed.items())[:needed]}
        secret = _join(answers)
        if client in masked:
            total = total - _mask(secret, total.size)
            continue
        private = x25519.X25519PrivateKey.from_private_bytes(secret)
        if private.public_key().public_bytes_raw() != keys[client][0]:
            raise ValueError(
                f"the shares of client {client}'s key are wrong; the round is skipped."
            )
        for other in masked:
            mask = _mask(_agree(private, keys[other][0], b"mask"), total.size)
            total = total - mask if other < client else total + mask
    return _signed(total)


# -- a whole round ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SecureResult:
    """What a round gave.

    Attributes:
      mean: weighted mean of the arrived clients' trees, within half a step of quantisation; clipped values show in it.
      weight: sum of their weights.
      total: int64 [n + 1], the exact sum of quantised values.
      arrived: the clients in it.
      bytes_up: of all clients together: keys, sealed shares, masked vectors, revealed shares.
    """

    mean: Any
    weight: int
    total: np.ndarray
    arrived: tuple[int, ...]
    bytes_up: int


def secure_mean(
    trees: Mapping[int, Any],
    weights: Mapping[int, int],
    config: SecureConfig = SecureConfig(),
    *,
    dropped: Collection[int] = (),
) -> SecureResult:
    """All stages among clients and a server in this process; every party sees only its own secrets and what is sent to it.

    Args:
      trees: float arrays of one structure and shapes, by client.
      weights: whole numbers of examples.
      config: the round's.
      dropped: clients that share keys and are then not heard of again.

    Raises:
      QuorumNotMet: if fewer than ``SecureConfig.needed`` are left.
      ValueError: for too few clients, a NaN (the client is named), or weights out of range.
    """
    clients = {k: SecureClient(k, config) for k in sorted(trees)}
    keys = {k: c.advertise() for k, c in clients.items()}
    shares = {k: c.share(keys) for k, c in clients.items()}
    masked = {}
    for k, client in clients.items():
        if k not in dropped:
            incoming = {sender: shares[sender][k] for sender in clients}
            try:
                masked[k] = client.masked(_flat(trees[k]), int(weights[k]), incoming)
            except ValueError as error:
                raise ValueError(f"client {k}: {error}") from None
    gone = [k for k in clients if k not in masked]
    needed = config.needed(len(keys))
    revealed = {}
    if len(masked) >= needed:  # otherwise clients would refuse; ``unmask`` says why
        revealed = {k: clients[k].reveal(list(masked), gone) for k in masked}
    total = unmask(masked, keys, list(clients), revealed, config)
    mean, weight = dequantize(total, config)
    sent = [*(v for row in shares.values() for v in row.values())]
    sent += [v for row in revealed.values() for v in row.values()]
    size = 64 * len(keys) + sum(map(len, sent)) + sum(v.nbytes for v in masked.values())
    like = trees[next(iter(masked))]
    return SecureResult(_unflat(mean, like), weight, total, tuple(masked), size)


def _flat(tree: Any) -> np.ndarray:
    leaves = [np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def _unflat(values: np.ndarray, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([np.size(x) for x in leaves])[:-1]
    parts = np.split(values, ends)
    made = [p.reshape(np.shape(x)).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


@dataclasses.dataclass(frozen=True)
class SecureMean:
    """An ``Aggregator``: the mean of the round's updates by the whole protocol, every client of the round a party.

    Attributes:
      config: the round's.
      individual: False: the server never sees a member, so koala refuses what needs one.
    """

    config: SecureConfig = SecureConfig()
    individual: bool = False
    minimum_replies: ClassVar[int] = 3  # of two, each would learn the other's from the sum

    def __post_init__(self):
        if self.individual:
            raise ValueError("individual must be False; got True. Use Mean to see members.")

    def check_clients(self, sizes: np.ndarray, most: int) -> None:
        """See ``fed.aggregate.check_clients``."""
        config, largest = self.config, int(np.argmax(sizes))
        if sizes[largest] > config.weight_limit:
            raise ValueError(
                f"clients of SecureMean must have at most weight_limit={config.weight_limit} examples; client {largest} has "
                f"{sizes[largest]}; raise the limit in SecureConfig."
            )
        if most > config.most_clients():
            raise ValueError(
                f"SecureMean must have at most {config.most_clients()} clients of an architecture in a round at levels={config.levels}; "
                f"got up to {most}; lower participation, levels or weight_limit."
            )

    def combine(
        self, updates: Any, weights: Float[Array, " K"], clients: Int[Array, " K"], key: Array
    ) -> Any:
        """The weighted mean, within half a step of quantisation per client; masks are drawn from the system, not from ``key``.

        Raises:
          QuorumNotMet: if the clients have no examples.
          ValueError: for fewer than three clients or too many, NaN, or weights out of range.
        """
        del key
        numbers, host = np.asarray(clients).tolist(), jax.device_get(updates)
        trees = {k: jax.tree.map(lambda x, i=i: x[i], host) for i, k in enumerate(numbers)}
        given = {k: round(float(w)) for k, w in zip(numbers, np.asarray(weights), strict=True)}
        return secure_mean(trees, given, self.config).mean

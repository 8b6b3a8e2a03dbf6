"""What travels between clients and server, smaller: parameters or updates in fewer bits, and logits as their k largest.

A payload is the bytes that would go over the wire: a header of ``HEADER_BYTES`` (format, codec, CRC-32 and length of the rest), then the
arrays of each leaf, in the tree's order. Names and shapes are known to both sides and don't travel. ``Codec.nbytes`` counts a
payload without making it and equals its length exactly; ``Codec.roundtrip`` is what the other side will see, as a pure function of arrays that
may be jitted and mapped over clients, so that simulating many of them needs no bytes at all.
"""

import dataclasses
import functools
import struct
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import sefp
from quant.rules import name_of

CODECS = ("none", "bfloat16", "int8", "sefp", "topk")
INT8_BLOCK = 256  # values that share a float32 scale: 1.6 % on top of the bytes
_MAGIC = b"JXF1"
_HEADER = struct.Struct("<4sBBHII")  # magic, codec, width, zero, CRC-32 and length of the body
HEADER_BYTES = _HEADER.size
_LOGITS = len(CODECS)  # the codec number of a payload of logits


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a tree of arrays is packed. Leaves that aren't floating are sent as they are.

    Attributes:
      name: "none" (bits as they are), "bfloat16", "int8" (blocks of 256 share a float32 scale, rounded to nearest), "sefp" (groups of 64
        share an exponent, after scaling the leaf to at most 1 by a power of two; ``quant``'s planes), or "topk" (the largest magnitudes
        as float32 with uint32 places; the rest are zeros: for updates, not for parameters).
      width: bits of magnitude of "sefp", 3 to 8.
      fraction: of each leaf that "topk" sends, rounded up.

    Raises:
      ValueError: for a name, width or fraction that there isn't.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {"w": jnp.linspace(-1.0, 1.0, 128)}
      >>> codec = Codec("sefp", width=4)
      >>> payload = codec.encode(tree)
      >>> len(payload), codec.nbytes(tree), codec.decode(payload, tree)["w"].shape
      (102, 102, (128,))
    """

    name: str = "none"
    width: int = 8
    fraction: float = 0.1

    def __post_init__(self):
        if self.name not in CODECS:
            raise ValueError(
                f"codec must be one of {', '.join(CODECS)}; got {self.name!r}. Use 'none' to send bits as they are."
            )
        if self.name == "sefp" and not 3 <= self.width <= sefp.MASTER_WIDTH:
            raise ValueError(
                f"width must be from 3 to {sefp.MASTER_WIDTH}; got {self.width}. Lower widths aren't stored."
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction must be above 0 and at most 1; got {self.fraction}. Use 0.1 for a tenth of the values."
            )

    @property
    def lossless(self) -> bool:
        """Whether what arrives is what was sent."""
        return self.name == "none"

    def roundtrip(self, tree: Any) -> Any:
        """What the receiver sees, in the leaves' own dtypes: bit for bit ``decode(encode(tree), tree)``. Pure."""
        return jax.tree.map(lambda x: self._unpack(self._pack(x), x), tree)

    def nbytes(self, tree: Any) -> int:
        """Length in bytes of ``encode(tree)``; ``tree`` may hold shapes (``jax.ShapeDtypeStruct``)."""
        packed = jax.tree.leaves([self._packed_shapes(x) for x in jax.tree.leaves(tree)])
        return HEADER_BYTES + sum(x.size * x.dtype.itemsize for x in packed)

    def apply(self, update: Any, client: Any, key: Any) -> Any:
        """``roundtrip``: a codec is a ``fed.uploads.Upload``, the last of those that a run is given."""
        del client, key
        return self.roundtrip(update)

    def encode(self, tree: Any) -> bytes:
        """The payload.

        Raises:
          ValueError: for NaN or infinity in a leaf, which is named; "none" and "bfloat16" carry them.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if _is_floating(leaf) and self.name not in ("none", "bfloat16"):
                _check_finite(name_of(path), leaf)
        packed = jax.device_get(_pack_all(self, jax.tree.leaves(tree)))
        pieces = [np.asarray(x).tobytes() for x in jax.tree.leaves(packed)]
        return _framed(CODECS.index(self.name), self.width, b"".join(pieces))

    def decode(self, payload: bytes, like: Any) -> Any:
        """The tree that ``payload`` holds.

        Args:
          payload: from ``encode`` of the same codec.
          like: a tree of the same structure, shapes and dtypes, values not read.

        Raises:
          ValueError: for a payload that is damaged, cut, of another codec, or of another tree.
        """
        body = _unframed(payload, CODECS.index(self.name), self.width)
        leaves, structure = jax.tree.flatten(like)
        expected = self.nbytes(like) - HEADER_BYTES
        if len(body) != expected:
            raise ValueError(
                f"payload has {len(body)} bytes of values, and the tree needs {expected}; give decode the tree that was sent."
            )
        shapes, packing = jax.tree.flatten([self._packed_shapes(leaf) for leaf in leaves])
        offset, arrays = 0, []
        for shape in shapes:
            arrays.append(_read(body, offset, shape.dtype, shape.shape))
            offset += arrays[-1].nbytes
        forms = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
        decoded = _unpack_all(self, forms, jax.tree.unflatten(packing, arrays))
        return jax.tree.unflatten(structure, decoded)

    def _packed_shapes(self, leaf: Any) -> Any:
        return jax.eval_shape(self._pack, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))

    def _pack(self, leaf: Any) -> Any:
        """A leaf as the arrays that are sent."""
        if self.name == "none" or not _is_floating(leaf) or leaf.size == 0:
            return leaf
        if self.name == "bfloat16":
            return leaf.astype(jnp.bfloat16)
        flat = leaf.reshape(-1).astype(jnp.float32)
        if self.name == "int8":
            return _to_int8(flat)
        if self.name == "sefp":
            scale = _power_above(jnp.abs(flat).max())
            return scale, sefp.encode((flat / scale)[:, None], width=self.width, rounding="nearest")
        count = max(1, int(np.ceil(self.fraction * flat.size)))
        places = jax.lax.top_k(jnp.abs(flat), count)[1]
        return flat[places], places.astype(jnp.uint32)

    def _unpack(self, packed: Any, leaf: Any) -> Any:
        """The leaf that ``_pack`` took; of ``leaf`` only shape and dtype are read."""
        if self.name == "none" or not _is_floating(leaf) or leaf.size == 0:
            return packed
        if self.name == "bfloat16":
            return packed.astype(leaf.dtype)
        if self.name == "int8":
            flat = _from_int8(*packed)[: leaf.size]
        elif self.name == "sefp":
            scale, stored = packed
            flat = sefp.decode(stored, dtype=jnp.float32)[:, 0] * scale
        else:
            values, places = packed
            flat = jnp.zeros(leaf.size, jnp.float32).at[places].set(values)
        return flat.reshape(leaf.shape).astype(leaf.dtype)


def codec_named(text: str) -> Codec:
    """none, bfloat16, int8, sefp[:WIDTH] or topk[:FRACTION].

    Raises:
      ValueError: for anything else.
    """
    name, _, value = text.partition(":")
    try:
        if value and name == "sefp":
            return Codec(name, width=int(value))
        if value and name == "topk":
            return Codec(name, fraction=float(value))
    except ValueError as error:
        raise ValueError(f"codec {text!r} has a wrong number: {error}") from None
    if value:
        raise ValueError(f"codec {name} takes no number; got {text!r}.")
    return Codec(name)


@functools.partial(jax.jit, static_argnums=0)
def _pack_all(codec: Codec, leaves: list[Any]) -> list[Any]:
    return [codec._pack(jnp.asarray(x)) for x in leaves]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unpack_all(codec: Codec, forms: tuple[Any, ...], packed: list[Any]) -> list[Any]:
    return [codec._unpack(x, form) for x, form in zip(packed, forms, strict=True)]


def with_feedback(codec: Codec, update: Any, residual: Any) -> tuple[Any, Any]:
    """What is sent of ``update`` when what earlier rounds lost is added to it, and what is lost now: error feedback. Pure.

    Over rounds the sum of what was sent differs from the sum of the updates by the last residual only (Seide et al. 2014; Karimireddy et
    al. 2019).

    Args:
      codec: of the updates.
      update: tree of arrays.
      residual: like ``update``; zeros before the first round.

    Returns:
      (what the receiver sees, the next residual).
    """
    corrected = jax.tree.map(jnp.add, update, residual)
    seen = codec.roundtrip(corrected)
    return seen, jax.tree.map(jnp.subtract, corrected, seen)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _check_finite(name: str, x: Any) -> None:
    if not np.isfinite(np.asarray(x).astype(np.float32)).all():
        raise ValueError(
            f"{name or 'the array'} has NaN or infinity, which this codec cannot carry; reject the update, or send it as 'none'."
        )


def _to_int8(
    flat: Float[Array, " n"],
) -> tuple[Int[Array, "blocks block"], Float[Array, " blocks"]]:
    padded = jnp.pad(flat, (0, -flat.size % INT8_BLOCK)).reshape(-1, INT8_BLOCK)
    scales = jnp.abs(padded).max(1) / 127.0
    # A block of zeros has scale zero; its values are zero whatever they are divided by.
    codes = jnp.round(padded / jnp.where(scales > 0, scales, 1.0)[:, None])
    return jnp.clip(codes, -127.0, 127.0).astype(jnp.int8), scales


def _from_int8(
    codes: Int[Array, "blocks block"], scales: Float[Array, " blocks"]
) -> Float[Array, " n"]:
    return (codes.astype(jnp.float32) * scales[:, None]).reshape(-1)


def _power_above(x: Float[Array, ""]) -> Float[Array, ""]:
    """The smallest power of two above ``x``, within float32's normal numbers; 1 for zero. Dividing by it is exact."""
    _, exponent = jnp.frexp(x)
    return jnp.where(
        x > 0, jnp.ldexp(jnp.ones((), jnp.float32), jnp.clip(exponent, -100, 127)), 1.0
    )


def _framed(codec: int, width: int, body: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, codec, width, 0, zlib.crc32(body), len(body)) + body


def _unframed(payload: bytes, codec: int, width: int) -> bytes:
    if len(payload) < HEADER_BYTES or payload[:4] != _MAGIC:
        raise ValueError(
            f"payload does not begin with {_MAGIC!r} ({len(payload)} bytes); it was not made by fed.compress."
        )
    _, found, found_width, _, checksum, size = _HEADER.unpack_from(payload)
    body = payload[HEADER_BYTES:]
    if (found, found_width) != (codec, width):
        raise ValueError(
            f"payload is of codec {_codec_name(found)} with width {found_width}, not {_codec_name(codec)} with {width}; decode it "
            "with the codec that made it."
        )
    if len(body) != size or zlib.crc32(body) != checksum:
        raise ValueError(
            f"payload is damaged or cut ({len(body)} bytes of {size}, or another checksum); send it again."
        )
    return body


def _codec_name(number: int) -> str:
    return CODECS[number] if number < len(CODECS) else "logits"


def _read(body: bytes, offset: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(body, dtype, count, offset).reshape(shape)


# -- logits ----------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopLogits:
    """The k most probable tokens of each position; the rest of the mass is known from theirs and counts as spread evenly.

    Attributes:
      log_probs: float32 [*S, k], nats; -inf where there is no entry.
      ids: int32 [*S, k].
      vocab_size: V.
    """

    log_probs: Any
    ids: Any
    vocab_size: int = dataclasses.field(metadata={"static": True})

    @property
    def k(self) -> int:
        """Tokens per position."""
        return self.ids.shape[-1]

    def dense(self) -> Float[Array, "*S V"]:
        """Log-probabilities of all tokens; float32, normalised up to the precision of what was sent."""
        count = self.ids.size // self.k
        ids, values = self.ids.reshape(count, self.k), self.log_probs.reshape(count, self.k)
        rows = jnp.arange(count, dtype=jnp.int32)[:, None]
        sent = jnp.full((count, self.vocab_size), -jnp.inf, jnp.float32).at[rows, ids].max(values)
        present = sent > -jnp.inf
        rest = jnp.maximum((~present).sum(-1, keepdims=True), 1).astype(jnp.float32)
        # Rounded values may add up to more than one.
        tail = jnp.maximum(-jnp.expm1(jax.nn.logsumexp(values, axis=-1, keepdims=True)), 1e-12)
        full = jnp.where(present, sent, jnp.log(tail / rest))
        full = full.reshape(*self.ids.shape[:-1], self.vocab_size)
        return jax.nn.log_softmax(full, axis=-1)

    def encode(self) -> bytes:
        """The payload: bfloat16 log-probabilities, ids in the fewest whole bytes (1, 2 or 4) that the vocabulary needs."""
        values = np.asarray(jnp.asarray(self.log_probs).astype(jnp.bfloat16))
        ids = np.asarray(self.ids).astype(_id_dtype(self.vocab_size))
        return _framed(_LOGITS, 0, values.tobytes() + ids.tobytes())

    @classmethod
    def decode(cls, payload: bytes, shape: tuple[int, ...], vocab_size: int) -> "TopLogits":
        """What ``encode`` made.

        Args:
          payload: its bytes.
          shape: [*S, k].
          vocab_size: V.

        Raises:
          ValueError: for a payload that is damaged, or of another shape or vocabulary.
        """
        body = _unframed(payload, _LOGITS, 0)
        expected = logits_nbytes(shape, vocab_size) - HEADER_BYTES
        if len(body) != expected:
            raise ValueError(
                f"payload has {len(body)} bytes of values; logits of shape {shape} over {vocab_size} tokens have {expected}. Check "
                "the public set and k."
            )
        values = _read(body, 0, jnp.bfloat16, shape)
        ids = _read(body, values.nbytes, _id_dtype(vocab_size), shape).astype(np.int32)
        if ids.size and ids.max() >= vocab_size:
            raise ValueError(
                f"payload names token {ids.max()} of {vocab_size}; the sender has another vocabulary."
            )
        return cls(jnp.asarray(values).astype(jnp.float32), jnp.asarray(ids), vocab_size)


def _id_dtype(vocab_size: int) -> Any:
    return next(t for t in (np.uint8, np.uint16, np.uint32) if vocab_size - 1 <= np.iinfo(t).max)


def top_logits(logits: Float[Array, "*S V"], k: int = 128) -> TopLogits:
    """The k most probable tokens of each position (FedMKT sends 128).

    Args:
      logits: of any floating dtype.
      k: at most V counts.

    Raises:
      ValueError: for k below one.

    Example:
      >>> import jax.numpy as jnp
      >>> top = top_logits(jnp.log(jnp.array([0.5, 0.3, 0.1, 0.1])), k=2)
      >>> top.ids.tolist(), [round(float(p), 3) for p in jnp.exp(top.dense())], len(top.encode())
      ([0, 1], [0.5, 0.3, 0.1, 0.1], 22)
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}. FedMKT sends 128.")
    vocab_size = logits.shape[-1]
    normal = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, ids = jax.lax.top_k(normal, min(k, vocab_size))
    return TopLogits(values, ids.astype(jnp.int32), vocab_size)


def logits_nbytes(shape: tuple[int, ...], vocab_size: int) -> int:
    """Length in bytes of the payload of ``TopLogits`` of shape [*S, k]."""
    count = int(np.prod(shape, dtype=np.int64))
    return HEADER_BYTES + count * (2 + np.dtype(_id_dtype(vocab_size)).itemsize)

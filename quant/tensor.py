"""A parameter stored in SEFP: the format of ``pallas_kernels.sefp`` for tensors of any rank.

The format knows matrices [..., K, N] with groups of 64 along K. A parameter [*batch, *inputs, *outputs] is one, or several, of them
once its input axes are one and its output axes are one; ``Layout`` says which they are.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import sefp
from pallas_kernels.sefp.format import BASE_WIDTH, MASTER_WIDTH


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a parameter's last axes are used; those before are a batch of matrices (layers, experts, heads).

    Attributes:
      inputs: how many axes are contracted.
      outputs: how many are not.
      outputs_first: [*batch, *outputs, *inputs]: an embedding, whose rows are results.
    """

    inputs: int = 1
    outputs: int = 1
    outputs_first: bool = False

    def split(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes (batch, inputs, outputs) of a parameter.

        Raises:
          ValueError: if it has too few axes.
        """
        if len(shape) < self.inputs + self.outputs:
            raise ValueError(
                f"a parameter of shape {shape} lacks axes for {self.inputs} of input and {self.outputs} of output; choose another "
                "layout for it, or leave it as it is."
            )
        ends = len(shape) - self.inputs - self.outputs
        first = self.outputs if self.outputs_first else self.inputs
        a, b = shape[ends : ends + first], shape[ends + first :]
        return (shape[:ends], b, a) if self.outputs_first else (shape[:ends], a, b)

    def matrices(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """``w`` as [*batch, K, N]."""
        batch, inputs, outputs = self.split(w.shape)
        k, n = math.prod(inputs), math.prod(outputs)
        if self.outputs_first:
            return w.reshape(*batch, n, k).swapaxes(-1, -2)
        return w.reshape(*batch, k, n)

    def restored(
        self, w: Float[Array, "..."], inputs: tuple[int, ...], outputs: tuple[int, ...]
    ) -> Float[Array, "..."]:
        """What ``matrices`` took."""
        batch = w.shape[:-2]
        if self.outputs_first:
            return w.swapaxes(-1, -2).reshape(*batch, *outputs, *inputs)
        return w.reshape(*batch, *inputs, *outputs)


def default_layout(ndim: int) -> Layout:
    """One input axis and one output axis, the last ones; a vector is contracted."""
    return Layout(1, 0) if ndim == 1 else Layout()


def check_group(group: int) -> None:
    """Raises ValueError for a group that the format doesn't have."""
    if group != sefp.GROUP:
        raise ValueError(
            f"group must be {sefp.GROUP}, the length that storage and kernels are made for; got {group}."
        )


def check_width(width: int) -> None:
    """Raises ValueError for a width that no tensor has stored."""
    if not BASE_WIDTH <= width <= MASTER_WIDTH:
        raise ValueError(f"width must be from {BASE_WIDTH} to {MASTER_WIDTH}; got {width}.")


def check_floating(w: Any, name: str = "w") -> None:
    """Raises TypeError for what can't be encoded."""
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name} must be of a floating type; got {w.dtype}. Leave it as it is.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SefpTensor:
    """A parameter in SEFP; a pytree whose arrays may be sharded, and stacked, sliced, scanned and mapped along its batch axes.

    Every width up to the stored one is inside: ``truncate`` drops planes and copies nothing. The gradient of what is stored is
    zero: to train, keep arrays and ``fake_quantize`` them.

    Attributes:
      stored: ``Sefp`` [*batch, K, N].
      inputs: sizes of the contracted axes; K is their product.
      outputs: sizes of the others; N is their product.
      layout: their order.
      dtype: of the decoded weights; what they were given in.
      pinned: its width isn't chosen with the others' (``Rule.width``).
    """

    stored: Any
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    pinned: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def encode(
        cls,
        w: Float[Array | np.ndarray, "..."],
        group: int = sefp.GROUP,
        width: int = sefp.MASTER_WIDTH,
        *,
        layout: Layout | None = None,
        rounding: str = "truncate",
        pinned: bool = False,
    ) -> "SefpTensor":
        """Encodes a parameter.

        Args:
          w: [*batch, *inputs, *outputs].
          group: 64; there is no other.
          width: 3 to 8.
          layout: which axes are contracted; default the last but one (of a vector: its own).
          rounding: "truncate", "nearest" or "nested", as of ``pallas_kernels.sefp.encode``.
          pinned: see the class.

        Raises:
          ValueError, TypeError: for a group, width, rounding, layout or dtype that doesn't fit; NaN or infinity, unless traced.

        Example:
          >>> import jax.numpy as jnp
          >>> t = SefpTensor.encode(jnp.full((64, 2), 0.8125))
          >>> t.truncate(3).decode(jnp.float32)[0].tolist(), t.nbytes(3), t.nbytes(8)
          ([0.75, 0.75], 66, 146)
        """
        check_group(group)
        w = jnp.asarray(w)
        check_floating(w)
        layout = default_layout(w.ndim) if layout is None else layout
        _, inputs, outputs = layout.split(w.shape)
        stored = sefp.encode(layout.matrices(w), width=width, rounding=rounding)
        return cls(stored, inputs, outputs, layout, np.dtype(w.dtype), pinned)

    @property
    def width(self) -> int:
        """Bits of magnitude that are stored."""
        return self.stored.width

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        batch = self.stored.exponent.shape[:-2]
        if self.layout.outputs_first:
            return (*batch, *self.outputs, *self.inputs)
        return (*batch, *self.inputs, *self.outputs)

    @property
    def ndim(self) -> int:
        """Axes of the weights."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights, without padding."""
        return math.prod(self.shape)

    def truncate(self, width: int) -> "SefpTensor":
        """The same weights at a lower width: fewer planes, nothing copied.

        Raises:
          ValueError: if ``width`` isn't stored.
        """
        return dataclasses.replace(self, stored=self.stored.truncate(width))

    def decode(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The weights; exact in float32, bfloat16 and, up to 2^16, float16. Default: the dtype that they were given in."""
        w = sefp.decode(self.stored, dtype=self.dtype if dtype is None else dtype)
        return self.layout.restored(w, self.inputs, self.outputs)

    def nbytes(self, width: int | None = None) -> int:
        """Bytes that are read at ``width``; default: all that are stored. Padding to 64 counts."""
        return self.stored.nbytes(width)

    def astype(self, dtype: DTypeLike) -> "SefpTensor":
        """The same bits, decoded to another dtype."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def expand_batch(self) -> "SefpTensor":
        """[1, *batch, ...]."""
        return jax.tree.map(lambda a: a[None], self)

    def flatten_batch(self) -> "SefpTensor":
        """All batch axes as one."""
        batch = len(self.stored.exponent.shape) - 2
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[batch:]), self)

    def __repr__(self) -> str:
        return f"SefpTensor(E5M{self.width}, shape={self.shape}, {self.nbytes()} bytes)"


def is_sefp(x: Any) -> bool:
    """Whether a leaf is a ``SefpTensor``; for ``is_leaf``."""
    return isinstance(x, SefpTensor)

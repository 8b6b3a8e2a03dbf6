"""Matrix multiplication that dispatches on the type of the weight leaf."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import Sefp, grouped_matmul, native, sefp_matmul
from pallas_kernels.numerics import dot, precision_of
from quant.tensor import Layout, SefpTensor

PRODUCT = "per_head"  # name of its results, for policies that keep products


@struct.dataclass
class Stacked:
    """One layer's weight, addressed in the stack of all layers instead of being sliced out: a slice is a copy.

    Attributes:
      stack: [L, *shape]; an array or a ``SefpTensor``.
      layer: which one; may be traced.
    """

    stack: Any
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the one layer's weight."""
        return self.stack.shape[1:]


Weight = jax.Array | SefpTensor | Stacked  # what a parameter may be where layers read it


def is_weight(leaf: Any) -> bool:
    """For ``is_leaf``: a parameter in SEFP is one leaf, though a tree of arrays."""
    return isinstance(leaf, SefpTensor)


def whole(w: jax.Array | SefpTensor) -> Stacked:
    """A weight that is no layer's, as the only one of a stack: steps treat it like the others."""
    w = w.expand_batch() if isinstance(w, SefpTensor) else w[None]
    return Stacked(w, jnp.zeros((), jnp.int32))


def own(w: Weight) -> jax.Array | SefpTensor:
    """The weight apart from its stack, in the form in which it is stored."""
    if not isinstance(w, Stacked):
        return w
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, w.layer, 0, keepdims=False), w.stack)


def dense(w: Weight) -> jax.Array:
    """The weight as an array of its own."""
    w = own(w)
    return w.decode() if isinstance(w, SefpTensor) else w


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return dot(x, w, (1, 0)).astype(x.dtype)


_matmul_2d = jax.custom_vjp(_product)


def _matmul_2d_forward(x, w):
    return _product(x, w), (x, w)  # in the open, for policies that keep products


def _matmul_2d_backward(residuals, dy):
    x, w = residuals
    return dot(dy, w, (1, 1)).astype(x.dtype), dot(x, dy, (0, 0)).astype(w.dtype)


# JAX's own rule computes (dy.T @ x).T, for which XLA:CPU transposes dy and leaves its fast path: 7x slower.
_matmul_2d.defvjp(_matmul_2d_forward, _matmul_2d_backward)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x [..., K] @ w [K, N]``, accumulated in float32, in x's dtype."""
    y = _matmul_2d(x.reshape(-1, x.shape[-1]), w.astype(x.dtype))
    return y.reshape(*x.shape[:-1], w.shape[1])


def in_place(x: jax.Array, w: Weight) -> bool:
    """Whether a C++ kernel can use w where it lies in its stack, without a copy of the layer."""
    if not isinstance(w, Stacked) or x.dtype != jnp.float32:
        return False
    if not isinstance(w.stack, SefpTensor) and w.stack.dtype != jnp.float32:
        return False
    return native.available()


def _matrices(w: Stacked, inputs: int) -> jax.Array | Sefp:
    """All layers as [L, K, N]; no copy."""
    if isinstance(w.stack, SefpTensor):
        return w.stack.stored
    return w.stack.reshape(w.stack.shape[0], inputs, -1)


def _matmul_stacked(x: jax.Array, w: Stacked, inputs: int) -> jax.Array:
    """x [..., K] times a layer of w as [K, N]."""
    rows = math.prod(x.shape[:-1])
    stack = _matrices(w, inputs)
    if not in_place(x, w):
        one = own(Stacked(stack, w.layer))
        return sefp_matmul(x, one) if isinstance(one, Sefp) else matmul(x, one)
    every_row = jnp.full(1, rows, jnp.int32)
    y = grouped_matmul(x.reshape(rows, inputs), stack, every_row, group_offset=w.layer)
    return y.reshape(*x.shape[:-1], stack.shape[2])


def linear(x: jax.Array, p: dict[str, Any], *, contract: int = 1) -> jax.Array:
    """Applies ``p["weight"]`` [*in, *out] to the last ``contract`` axes of x and adds ``p["bias"]`` if present.

    Args:
      x: [..., *in].
      p: weight (an array, in SEFP, or either ``Stacked``) with its input axes first, optional bias of the output's shape.
      contract: number of input axes.

    Returns:
      [..., *out] in x's dtype.
    """
    w = p["weight"]
    inputs, outputs = w.shape[:contract], w.shape[contract:]
    lead = x.shape[: x.ndim - contract]
    size = math.prod(inputs)
    x = x.reshape(*lead, size)
    if isinstance(w, Stacked):
        y = _matmul_stacked(x, w, size)
    elif isinstance(w, SefpTensor):
        y = sefp_matmul(x, w.stored)
    else:
        y = matmul(x, w.reshape(size, math.prod(outputs)))
    y = y.reshape(*lead, *outputs)
    if "bias" in p:
        y = y + jnp.expand_dims(dense(p["bias"]).astype(y.dtype), tuple(range(len(lead))))
    return y


def merged_stack(w: jax.Array | SefpTensor) -> jax.Array | SefpTensor:
    """[L, G, ...] as [L * G, ...]; no copy."""
    return w.flatten_batch() if isinstance(w, SefpTensor) else w.reshape(-1, *w.shape[2:])


def transposed(w: jax.Array | SefpTensor) -> jax.Array | SefpTensor:
    """An embedding [V, D] as a head [D, V]; no copy."""
    if not isinstance(w, SefpTensor):
        return w.T
    return dataclasses.replace(w, layout=Layout())


def embed(w: jax.Array | SefpTensor, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding [V, D]: tokens [...] -> [..., D]. Of one in SEFP only those rows are decoded."""
    if not isinstance(w, SefpTensor):
        return w[tokens]
    rows = jax.tree.map(lambda a: jnp.take(a, tokens.reshape(-1), axis=1), w.stored)
    rows = dataclasses.replace(w, stored=rows, outputs=(tokens.size,)).decode()
    return rows.reshape(*tokens.shape, -1)


def per_head(x: jax.Array, w: Weight) -> jax.Array:
    """Every head by its own matrix: x [B, T, H, N], w [H, N, C] -> [B, T, H, C] in x's dtype."""
    if not in_place(x, w):
        w = dense(w).astype(x.dtype)
        y = jnp.einsum("bthn,hnc->bthc", x, w, precision=precision_of(x.dtype))
        return checkpoint_name(y, PRODUCT)
    batch, tokens, heads, size = x.shape
    rows = x.transpose(2, 0, 1, 3).reshape(-1, size)
    stack = merged_stack(w.stack)
    stack = stack.stored if isinstance(stack, SefpTensor) else stack
    sizes = jnp.full(heads, batch * tokens, jnp.int32)
    y = grouped_matmul(rows, stack, sizes, group_offset=w.layer * heads)
    return y.reshape(heads, batch, tokens, -1).transpose(1, 2, 0, 3)

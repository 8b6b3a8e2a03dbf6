"""The experts' gated MLPs on rows grouped by expert."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxmoe.layers.mlp import gate
from pallas_kernels import Sefp, grouped_matmul, grouped_matmul_fp8
from pallas_kernels.numerics import precision_of
from quant.tensor import SefpTensor

PRODUCT = "experts"  # name of products with them, for policies that keep products


@struct.dataclass
class Experts:
    """Expert weights of one layer, or of several stacked ones. A pytree: ``slots`` stays static under jit.

    Attributes:
      gate_up: [G, D, 2, F]; an array or in SEFP, like the next.
      down: [G, F, D].
      slots: physical slots of one layer (the number of experts, unless some are replicated).
      offset: index of this layer's slot 0 in G; may be traced. A layer inside a scan is addressed by offset
        instead of being sliced out, so that a decode step reads only the experts it uses.
    """

    gate_up: Any
    down: Any
    slots: int = struct.field(pytree_node=False)
    offset: jax.Array | int = 0


def grouped_experts(
    experts: Experts,
    rows: jax.Array,
    group_sizes: jax.Array,
    activation: str,
    implementation=None,
    *,
    fp8: bool = False,
) -> jax.Array:
    """Rows [R, D] sorted by slot through their expert: [R, D]; with ``fp8`` by products of 8 bits."""
    product = grouped_matmul_fp8 if fp8 else grouped_matmul
    hidden = experts.gate_up.shape[-1]
    gate_up, down = _matrices(experts.gate_up, rows.dtype), _matrices(experts.down, rows.dtype)

    def times(x: jax.Array, w: jax.Array | Sefp) -> jax.Array:
        y = product(x, w, group_sizes, group_offset=experts.offset, implementation=implementation)
        return checkpoint_name(y, PRODUCT)

    h = gate(times(rows, gate_up).reshape(-1, 2, hidden), activation)
    return times(h, down)


def _matrices(w: jax.Array | SefpTensor, dtype: DTypeLike) -> jax.Array | Sefp:
    """[G, in, out] for the grouped matmul."""
    if isinstance(w, SefpTensor):
        return w.stored
    return w.astype(dtype).reshape(*w.shape[:2], -1)


def _slots_of(w: jax.Array | SefpTensor, experts: Experts, dtype: DTypeLike) -> jax.Array:
    """One layer's [slots, ...] as arrays."""
    start = experts.offset
    w = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, experts.slots), w)
    return w.decode(dtype) if isinstance(w, SefpTensor) else w.astype(dtype)


def every_expert(experts: Experts, x: jax.Array, activation: str) -> jax.Array:
    """All tokens through all experts: [slots, T, D]. The oracle's way, and the fastest for a few small experts."""
    slots = experts.slots
    gate_up = _slots_of(experts.gate_up, experts, x.dtype)
    down = _slots_of(experts.down, experts, x.dtype)
    size, hidden = down.shape[2], down.shape[1]
    precision = precision_of(x.dtype)
    h = jnp.einsum(
        "td,sdf->stf",
        x,
        gate_up.reshape(slots, size, 2 * hidden),
        precision=precision,
        preferred_element_type=jnp.float32,
    ).astype(x.dtype)
    h = gate(h.reshape(slots, -1, 2, hidden), activation)
    y = jnp.einsum("stf,sfd->std", h, down, precision=precision, preferred_element_type=jnp.float32)
    return checkpoint_name(y.astype(x.dtype), PRODUCT)

"""The experts' gated MLPs on rows grouped by expert."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxmoe.layers.mlp import gate
from pallas_kernels import grouped_matmul, grouped_matmul_fp8
from pallas_kernels.numerics import precision_of


@struct.dataclass
class Experts:
    """Expert weights of one layer, or of several stacked ones. A pytree: ``slots`` stays static under jit.

    Attributes:
      gate_up: [G, D, 2, F].
      down: [G, F, D].
      slots: physical slots of one layer (the number of experts, unless some are replicated).
      offset: index of this layer's slot 0 in G; may be traced. A layer inside a scan is addressed by offset
        instead of being sliced out, so that a decode step reads only the experts it uses.
    """

    gate_up: jax.Array
    down: jax.Array
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
    groups, size, _, hidden = experts.gate_up.shape
    gate_up = experts.gate_up.astype(rows.dtype).reshape(groups, size, 2 * hidden)
    h = product(
        rows, gate_up, group_sizes, group_offset=experts.offset, implementation=implementation
    )
    h = gate(h.reshape(-1, 2, hidden), activation)
    return product(
        h,
        experts.down.astype(rows.dtype),
        group_sizes,
        group_offset=experts.offset,
        implementation=implementation,
    )


def every_expert(experts: Experts, x: jax.Array, activation: str) -> jax.Array:
    """All tokens through all experts: [slots, T, D]. The oracle's way, and the fastest for a few small experts."""
    slots = experts.slots
    gate_up = jax.lax.dynamic_slice_in_dim(experts.gate_up, experts.offset, slots).astype(x.dtype)
    down = jax.lax.dynamic_slice_in_dim(experts.down, experts.offset, slots).astype(x.dtype)
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
    return jnp.einsum(
        "stf,sfd->std", h, down, precision=precision, preferred_element_type=jnp.float32
    ).astype(x.dtype)

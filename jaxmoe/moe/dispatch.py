"""Three ways to bring tokens to experts and back, behind one function.

* ``dense``: every token through every expert, then a weighted sum of the chosen ones. The oracle.
* ``local``: all experts here; sort pairs by slot, grouped matmul, unsort. On GPU like ``dense`` where our kernel does not take the weights.
* ``all_to_all``: experts sharded over a mesh axis, tokens too; padded exchange under ``shard_map``, with a
  capacity that no routing can exceed, so nothing is ever dropped. Each expert's hidden units may be sharded over another axis.

All three add a token's expert outputs in the order of its choices, in float32: the result does not depend on
where an expert runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxmoe.moe.experts import Experts, every_expert, grouped_experts
from jaxmoe.moe.tables import ExpertTables, slots_of
from pallas_kernels import combine, dispatch
from quant.tensor import SefpTensor

PATHS = ("dense", "local", "all_to_all", "exchange")


@dataclasses.dataclass(frozen=True)
class MoeOptions:
    """How experts are computed; static under jit.

    Attributes:
      path: "dense", "local", "all_to_all", or "exchange": the latter's body, for callers inside a ``shard_map`` over ``axis``.
      mesh: for all_to_all, the mesh whose ``axis`` the slots are sharded over.
      axis: mesh axis of the exchange.
      token_axes: mesh axes over which tokens are sharded; must include ``axis``.
      hidden_axis: mesh axis over which the experts' hidden units are sharded, if the mesh has it.
      fp8: products of operands rounded to 8 bits, in training (``grouped_matmul_fp8``).
    """

    path: str = "local"
    mesh: Mesh | None = None
    axis: str = "expert"
    token_axes: tuple[str, ...] = ("data", "expert")
    hidden_axis: str = "tensor"
    fp8: bool = False

    def __post_init__(self):
        if self.path not in PATHS:
            raise ValueError(f"path must be one of {PATHS}; got {self.path!r}.")
        if self.fp8 and self.path == "dense":
            raise ValueError(
                "path 'dense' has no products of 8 bits; choose another path, or fp8=False."
            )
        if self.path != "all_to_all":
            return
        if self.mesh is None or self.axis not in self.mesh.shape:
            axes = None if self.mesh is None else tuple(self.mesh.shape)
            raise ValueError(
                f"path 'all_to_all' needs a mesh with axis {self.axis!r}; got axes {axes}. Use sharding.make_mesh(expert=N)."
            )
        if self.axis not in self.token_axes:
            raise ValueError(f"token_axes must include {self.axis!r}; got {self.token_axes}.")


def options_on(mesh: Mesh | None, *, fp8: bool = False) -> MoeOptions:
    """How whole sequences pass the experts on a mesh, or on one device (None)."""
    return MoeOptions("local" if mesh is None else "all_to_all", mesh, fp8=fp8)


def _dense(
    x: jax.Array, slots: jax.Array, weights: jax.Array, experts: Experts, act: str
) -> jax.Array:
    outputs = every_expert(experts, x, act)
    token = jnp.arange(x.shape[0])
    total = jnp.zeros(x.shape, jnp.float32)
    for a in range(slots.shape[1]):
        chosen = outputs[jnp.maximum(slots[:, a], 0), token].astype(jnp.float32)
        # Replaced, not multiplied by zero: slot 0 may be a lost one.
        total = total + jnp.where(slots[:, a, None] >= 0, weights[:, a, None] * chosen, 0.0)
    return total.astype(x.dtype)


def _local(
    x: jax.Array, slots: jax.Array, weights: jax.Array, experts: Experts, act: str, fp8: bool
) -> jax.Array:
    def grouped(implementation: str | None = None) -> jax.Array:
        moved = dispatch(x, slots, experts.slots)
        sizes = moved.group_sizes
        y = grouped_experts(experts, moved.rows, sizes, act, implementation, fp8=fp8)
        return combine(y, moved.position, weights)

    if jax.default_backend() != "gpu" or fp8:
        return grouped()
    try:
        return grouped("mosaic_gpu")
    except NotImplementedError:
        # XLA's own grouped products are many times slower there than all experts on all tokens.
        return _dense(x, slots, weights, experts, act)


def _exchange(
    x: jax.Array,
    slots: jax.Array,
    weights: jax.Array,
    experts: Experts,
    axis: str,
    act: str,
    fp8: bool,
) -> jax.Array:
    """The per-rank body of ``all_to_all``: x [T, D], slots [T, A] global, experts this rank's L slots."""
    ranks = lax.axis_size(axis)
    if ranks == 1:  # nothing to exchange
        return _local(x, slots, weights, experts, act, fp8)
    per_rank = experts.slots
    tokens, active = slots.shape
    # A token's choices are distinct slots, so it can send at most min(A, L) rows to any one rank.
    capacity = tokens * min(active, per_rank)
    rank = jnp.where(slots >= 0, slots // per_rank, -1)
    outgoing = dispatch(x, rank, ranks)
    start = jnp.cumsum(outgoing.group_sizes) - outgoing.group_sizes
    lane = outgoing.position - start[jnp.maximum(rank, 0)]
    cell = jnp.where(rank >= 0, rank * capacity + lane, -1)

    target = jnp.where(cell >= 0, cell, ranks * capacity).reshape(-1)

    def by_cell(of_pair: jax.Array) -> jax.Array:
        return (
            jnp.full(ranks * capacity + 1, -1, jnp.int32).at[target].set(of_pair.reshape(-1))[:-1]
        )

    # Cells are filled from the dispatched rows, each of which goes to one cell: combine's positions must be distinct.
    row = by_cell(outgoing.position)[:, None]
    send = combine(outgoing.rows, row, jnp.ones_like(row, jnp.float32))
    send_slot = by_cell(slots % per_rank)

    swap = functools.partial(
        lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True
    )
    received, received_slot = swap(send), swap(send_slot)
    arrived = dispatch(received, received_slot[:, None], per_rank)
    y = grouped_experts(experts, arrived.rows, arrived.group_sizes, act, fp8=fp8)
    y = combine(y, arrived.position, jnp.ones_like(arrived.position, jnp.float32))
    return combine(swap(y), cell, weights)


def _all_to_all(
    x: jax.Array,
    slots: jax.Array,
    weights: jax.Array,
    experts: Experts,
    options: MoeOptions,
    act: str,
) -> jax.Array:
    mesh, axis = options.mesh, options.axis
    token_axes = tuple(a for a in options.token_axes if a in mesh.shape)
    shards = 1
    for a in token_axes:
        shards *= mesh.shape[a]
    tokens = x.shape[0]
    short = -tokens % shards
    x = jnp.pad(x, ((0, short), (0, 0)))
    slots = jnp.pad(slots, ((0, short), (0, 0)), constant_values=-1)
    weights = jnp.pad(weights, ((0, short), (0, 0)))
    # Axes of size 1 are named too: over those that are not, gradients would be summed, by a collective of one.
    idle = [a for a, size in mesh.shape.items() if size == 1]
    by_token = PartitionSpec((*token_axes, *(a for a in idle if a not in token_axes)))
    slot_axes = (axis, *(a for a in idle if a != axis))
    hidden = options.hidden_axis if mesh.shape.get(options.hidden_axis, 1) > 1 else None

    by_slot = (PartitionSpec(slot_axes, None, None, hidden), PartitionSpec(slot_axes, hidden))
    if isinstance(experts.down, SefpTensor):  # a tree of arrays, each beginning with the slots
        if hidden is not None:
            raise ValueError(
                f"experts in SEFP cannot be split over mesh axis {hidden!r}: their hidden units are stored in groups; use expert=N."
            )
        by_slot = (PartitionSpec(slot_axes),) * 2

    def body(x, slots, weights, gate_up, down):
        experts = Experts(gate_up, down, gate_up.shape[0])
        y = _exchange(x, slots, weights, experts, axis, act, options.fp8)
        if hidden is None:
            return y
        return lax.psum(y.astype(jnp.float32), hidden).astype(y.dtype)  # of all hidden units

    y = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(by_token, by_token, by_token, *by_slot),
        out_specs=by_token,
        # combine and dispatch hide custom derivatives, through which varying axes are not tracked.
        check_vma=False,
    )(x, slots, weights, experts.gate_up, experts.down)
    return y[:tokens]


def apply_experts(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    experts: Experts,
    *,
    activation: str = "silu",
    tables: ExpertTables | None = None,
    options: MoeOptions = MoeOptions(),
) -> jax.Array:
    """``y[t] = sum_a weights[t, a] * expert[expert_ids[t, a]](x[t])``.

    Args:
      x: [T, D].
      expert_ids: [T, A] int32, distinct per token; -1 for none.
      weights: [T, A] float32.
      experts: weights by slot; this rank's for "exchange".
      activation: of the gated MLP.
      tables: expert -> slots; None means expert e is in slot e.
      options: the path.

    Returns:
      [T, D] in x's dtype.

    Raises:
      ValueError: if the slots do not divide over the mesh axis.
    """
    slots = expert_ids if tables is None else slots_of(tables, expert_ids)
    if options.path == "dense":
        return _dense(x, slots, weights, experts, activation)
    if options.path == "local":
        return _local(x, slots, weights, experts, activation, options.fp8)
    if options.path == "exchange":
        return _exchange(x, slots, weights, experts, options.axis, activation, options.fp8)
    ranks = options.mesh.shape[options.axis]
    if experts.slots % ranks:
        raise ValueError(
            f"the number of expert slots ({experts.slots}) must be divisible by mesh axis {options.axis!r} ({ranks}); use a divisor, or add "
            "redundant slots."
        )
    return _all_to_all(x, slots, weights, experts, options, activation)

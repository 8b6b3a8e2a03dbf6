"""Placement tables as data: which physical slot holds which expert (architecture, idea 3).

A slot is one expert's place on one rank: rank r of P owns slots r*L .. r*L + L-1. Tables are array
arguments of the compiled step, so one executable serves every placement.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class ExpertTables:
    """Where each expert's copies are.

    Attributes:
      expert_slots: [E, R] int32, the slots of each expert's copies, -1 after the last.
      copies: [E] int32, how many copies are usable (>= 1 for every expert that may be chosen).

    Tables of several layers have a leading axis.
    """

    # Any: JAX also puts shapes and partition specs into the tree.
    expert_slots: Any
    copies: Any

    @classmethod
    def from_slots(
        cls, slot_expert: np.ndarray, num_experts: int, *, max_copies: int = 1
    ) -> "ExpertTables":
        """Tables for slots holding ``slot_expert`` [S] (-1 for an empty or lost slot).

        Raises:
          ValueError: if an expert has no slot, or more copies than ``max_copies``.
        """
        slots: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(np.asarray(slot_expert)):
            if expert >= 0:
                slots[expert].append(slot)
        missing = [e for e, s in enumerate(slots) if not s]
        if missing:
            raise ValueError(
                f"slot_expert must hold every expert; missing {missing}. Give each expert a slot."
            )
        most = max(len(s) for s in slots)
        if most > max_copies:
            raise ValueError(
                f"an expert has {most} copies but max_copies is {max_copies}; raise max_copies."
            )
        padded = [s + [-1] * (max_copies - len(s)) for s in slots]
        return cls(jnp.asarray(padded, jnp.int32), jnp.asarray([len(s) for s in slots], jnp.int32))


def identity_tables(num_experts: int) -> ExpertTables:
    """Expert e in slot e: the placement of unreplicated weights."""
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    return ExpertTables(ids[:, None], jnp.ones_like(ids))


def slots_of(tables: ExpertTables, expert_ids: jax.Array) -> jax.Array:
    """The slot to serve each (token, choice): copies take turns by token index, so that load spreads evenly.

    Args:
      tables: the placement.
      expert_ids: [T, A] int32; -1 stays -1.
    """
    token = jnp.arange(expert_ids.shape[0], dtype=jnp.int32)[:, None]
    safe = jnp.maximum(expert_ids, 0)
    slot = tables.expert_slots[safe, token % tables.copies[safe]]
    return jnp.where(expert_ids >= 0, slot, -1)

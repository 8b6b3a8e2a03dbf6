"""Which rank has which part of the training state, and where a rank gets a part that it lacks: pure.

Experts are split over the mesh's "expert" axis, everything else is the same on all ranks. So a lost rank takes nothing along but
its experts, and those of one expert (parameters and both moments) are the unit that ranks keep, give and get.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.sharding import make_mesh
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.step import state_shardings

AXIS = "expert"


class MeshShape(NamedTuple):
    """Sizes of the mesh's axes; ``expert`` divides the number of experts."""

    data: int
    expert: int


def mesh_shape(ranks: int, experts: int) -> MeshShape:
    """The mesh of so many ranks that splits the experts most: 4 ranks with 8 experts are 1 x 4, 3 ranks are 3 x 1."""
    split = math.gcd(ranks, experts) if experts else 1
    return MeshShape(ranks // split, split)


def groups(order: Sequence[Any], shape: MeshShape) -> list[tuple[Any, ...]]:
    """The sets of devices, in their order, that have collectives of their own: the whole mesh, its rows and its columns."""
    order = tuple(order)
    rows = [order[i : i + shape.expert] for i in range(0, len(order), shape.expert)]
    columns = [order[i :: shape.expert] for i in range(shape.expert)]
    return [group for group in {order, *rows, *columns} if len(group) > 1]


def own_experts(position: int, shape: MeshShape, experts: int) -> range:
    """Experts on the rank at this place of the mesh, counted row by row."""
    size = experts // shape.expert
    first = position % shape.expert * size
    return range(first, first + size)


def neighbour(position: int, shape: MeshShape) -> int | None:
    """Whose experts the rank keeps too, so that any one rank may be lost; None where every expert is on several ranks anyway."""
    if shape.data > 1 or shape.expert == 1:
        return None
    return (position + 1) % shape.expert


def kept_experts(position: int, shape: MeshShape, experts: int) -> list[int]:
    """A rank's own experts and its neighbour's: what it keeps copies of in host memory."""
    beside = neighbour(position, shape)
    of = [position] if beside is None else [position, beside]
    return [expert for place in of for expert in own_experts(place, shape, experts)]


class Part(NamedTuple):
    """A part of the state at one step, in host memory.

    Attributes:
      common: the leaves that all ranks have; None in an answer that was to be without them.
      experts: of each expert in this part, its piece of every other leaf.
    """

    common: tuple[np.ndarray, ...] | None
    experts: dict[int, tuple[np.ndarray, ...]]

    def only(self, experts: Iterable[int], *, common: bool) -> "Part":
        """Of this part what is asked for and there."""
        found = {e: self.experts[e] for e in experts if e in self.experts}
        return Part(self.common if common else None, found)


def expert_axes(config: ModelConfig, train_config: TrainConfig) -> list[int | None]:
    """For every leaf of a ``TrainState`` the axis along which experts lie, None for those that all ranks have."""
    mesh = make_mesh(devices=jax.local_devices()[:1])
    shardings = jax.tree.leaves(state_shardings(config, train_config, mesh))
    return [s.spec.index(AXIS) if AXIS in s.spec else None for s in shardings]


def take_apart(leaves: Iterable[Any], axes: Iterable[int | None], experts: Iterable[int]) -> Part:
    """A part from leaves that hold just these experts. Everything is copied: the arrays may be donated to the next step."""
    experts = list(experts)
    common: list[np.ndarray] = []
    pieces: list[list[np.ndarray]] = [[] for _ in experts]
    for leaf, axis in zip(leaves, axes, strict=True):
        copy = np.array(leaf)
        if axis is None:
            common.append(copy)
            continue
        for piece, array in zip(pieces, np.split(copy, len(experts), axis), strict=True):
            piece.append(array)
    return Part(tuple(common), dict(zip(experts, map(tuple, pieces), strict=True)))


def put_together(
    part: Part, axes: Iterable[int | None], experts: Iterable[int]
) -> list[np.ndarray]:
    """The inverse of ``take_apart``: leaves with these experts, as arrays of their own."""
    common = iter(part.common or ())
    pieces = zip(*(part.experts[e] for e in experts), strict=True)
    return [
        np.array(next(common)) if axis is None else np.concatenate(next(pieces), axis)
        for axis in axes
    ]


class Sources(NamedTuple):
    """What a rank has to get, by name of who has it; the rest it holds already.

    Attributes:
      common: who has the leaves that all ranks have; None if it is at hand.
      experts: which experts to get from whom.
    """

    common: str | None
    experts: dict[str, tuple[int, ...]]


def plan_sources(
    wanted: Mapping[str, Iterable[int]], held: Mapping[str, frozenset[int]]
) -> dict[str, Sources]:
    """Where everyone gets what; experts come from whoever has been asked for the fewest so far.

    Args:
      wanted: experts that each rank shall have, by its name.
      held: experts that each has. Whoever is in it also has the common leaves. Together they hold all that is wanted.
    """
    asked: Counter[str] = Counter()
    plans = {}
    for name, experts in wanted.items():
        fetch: dict[str, list[int]] = {}
        for expert in experts:
            if expert in held.get(name, ()):
                continue
            source = min((s for s in held if expert in held[s]), key=lambda s: asked[s])
            asked[source] += 1
            fetch.setdefault(source, []).append(expert)
        common = None if name in held else min(held, key=lambda s: asked[s])
        plans[name] = Sources(common, {s: tuple(e) for s, e in fetch.items()})
    return plans


def restorable(inventories: Mapping[int, Mapping[int, frozenset[int]]], experts: int) -> int | None:
    """The latest step of which these ranks together hold everything.

    Args:
      inventories: by rank, the experts that it holds of each step that it has anything of.
      experts: how many there are.
    """
    steps = sorted({step for of in inventories.values() for step in of}, reverse=True)
    for step in steps:
        if (
            len(frozenset().union(*(of.get(step, frozenset()) for of in inventories.values())))
            == experts
        ):
            return step
    return None

"""A rank's weights: on its device all that every rank has and the experts in its slots, in its host memory copies for others."""

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

import jax
import numpy as np

from jaxmoe import params as params_lib
from jaxmoe.config import ModelConfig
from jaxmoe.elastic.cluster.messages import FetchValue, Fill, Setup
from jaxmoe.elastic.cluster.sockets import limit
from jaxmoe.elastic.executables import Executables
from jaxmoe.elastic.inventory import CHECKPOINT, checksum
from jaxmoe.params import Params
from jaxmoe.sharding import specs

logger = logging.getLogger(__name__)

_STOPPED_S = 10.0  # a peer of whom nothing comes for so long gives no weights

AXIS = "expert"
Leaves = tuple[np.ndarray, ...]
"""An expert's weights, in the order of their names."""


def _places(config: ModelConfig) -> list[tuple[int, int, int]]:
    """For every layer with experts: its segment, its member, and which of the member's repeats it is."""
    return [
        (i, j, repeat)
        for i, segment in enumerate(config.segments)
        for repeat in range(segment.repeats)
        for j, kind in enumerate(segment.kinds)
        if kind.mlp == "moe"
    ]


def routed_layers(config: ModelConfig) -> int:
    """How many layers have experts."""
    return len(_places(config))


def _update(leaf: jax.Array, rows: jax.Array, repeat: jax.Array, slot: jax.Array) -> jax.Array:
    start = (repeat, slot, *[np.int32(0)] * (leaf.ndim - 2))
    return jax.lax.dynamic_update_slice(leaf, rows[None, None].astype(leaf.dtype), start)


class Shard:
    """A rank's weights. Safe to read from other threads while it is written.

    Args:
      setup: the model, and how many slots.
      number: the rank's.
      load: reads the whole model.
      programs: where compiled functions are kept.
      device: to begin with.
      key: proves to other ranks that this is one.
    """

    def __init__(
        self,
        setup: Setup,
        number: int,
        load: Callable[[], Params],
        programs: Executables,
        device: jax.Device,
        key: bytes,
    ):
        self._key = key
        self.specs = specs(setup.config)
        self._slots, self._load, self._programs = setup.slots, load, programs
        self._places = _places(setup.config)
        self._lock = threading.Lock()
        self._incoming: dict[tuple[int, int], Leaves] = {}
        full = jax.tree.map(np.asarray, load())
        experts = range(setup.config.n_routed_experts)
        layers = range(len(self._places))
        self.canaries = np.array(
            [[checksum(self._of(full, layer, e)) for e in experts] for layer in layers], np.int64
        )
        flat, kinds = params_lib.flatten(full), params_lib.flatten(self.specs)
        self.trunk = checksum(leaf for name, leaf in flat.items() if AXIS not in kinds[name])
        self._backup = {
            (layer, e): tuple(np.array(x) for x in self._of(full, layer, e))
            for layer, e in np.argwhere(setup.backup[number]).tolist()
        }
        self.device = device
        self.local = jax.tree.map(self._begin, full, self.specs)
        if setup.initial is not None:
            own = setup.initial.reshape(len(self._places), -1, self._slots)[:, number]
            held = [(layer, s, int(e)) for (layer, s), e in np.ndenumerate(own) if e >= 0]
            self._write({(layer, s): self._of(full, layer, e) for layer, s, e in held})

    def _begin(self, leaf: np.ndarray, spec: jax.sharding.PartitionSpec) -> jax.Array:
        if AXIS in spec:
            shape = list(leaf.shape)
            shape[spec.index(AXIS)] = self._slots
            leaf = np.zeros(shape, leaf.dtype)
        return jax.device_put(leaf, self.device)

    def _of(self, tree: Any, layer: int, index: int) -> Leaves:
        """An expert's weights in a tree of parameters."""
        segment, member, repeat = self._places[layer]
        experts = tree["segments"][segment][member]["moe"]["experts"]
        return tuple(np.asarray(experts[name])[repeat, index] for name in sorted(experts))

    # -- reading -----------------------------------------------------------------------------------

    def read(self, layer: int, slot: int) -> Leaves:
        """A copy of the weights in a slot."""
        with self._lock:
            return tuple(np.array(x) for x in self._of(self.local, layer, slot))

    def wrong(self, canaries: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Slots whose weights don't have the checksum of ``canaries`` [layers, slots]; -1 for slots that may hold anything."""
        there = [(layer, slot) for (layer, slot), c in np.ndenumerate(canaries) if c >= 0]
        return tuple(at for at in there if checksum(self.read(*at)) != canaries[at])

    def _get(self, fills: list[Fill]) -> Iterator[Leaves | None]:
        """The weights for fills that all come from one place; None for those that aren't there."""
        first = fills[0]
        if first.address is not None:
            asked = [(f.layer, f.expert, f.source_slot) for f in fills]
            yield from self._ask(first.address, asked)
        elif first.source == CHECKPOINT:
            full = self._load()
            yield from (self._of(full, f.layer, f.expert) for f in fills)
        else:
            yield from (self.give(f.layer, f.expert, f.source_slot) for f in fills)

    def _ask(self, address: str, asked: list[tuple[int, int, int | None]]) -> list[Leaves | None]:
        """What another rank's ``give`` says."""
        with Client(address) as connection:
            limit(connection, _STOPPED_S)
            answer_challenge(connection, self._key)
            deliver_challenge(connection, self._key)
            connection.send(asked)
            return connection.recv()

    def give(self, layer: int, expert: int, slot: int | None) -> Leaves | None:
        """The weights in a slot; without one those of an expert in host memory, None if they aren't kept there."""
        return self._backup.get((layer, expert)) if slot is None else self.read(layer, slot)

    def fetch(self, fills: Iterable[Fill]) -> FetchValue:
        """Gets the weights for all fills and keeps those that are whole."""
        sources: dict[tuple, list[int]] = {}
        fills = tuple(fills)
        for i, fill in enumerate(fills):
            sources.setdefault((fill.source, fill.address), []).append(i)
        failed: list[int] = []
        seconds: Counter[str] = Counter()
        for (source, address), indices in sources.items():
            began, missing = time.perf_counter(), set(indices)
            try:
                for i, leaves in zip(indices, self._get([fills[i] for i in indices]), strict=True):
                    fill = fills[i]
                    if leaves is not None and checksum(leaves) == fill.canary:
                        self._incoming[fill.layer, fill.slot] = leaves
                        missing.remove(i)
            except (OSError, EOFError, AuthenticationError) as error:
                logger.warning("source failed source=%s error=%s", address or source, error)
            failed += sorted(missing)
            seconds[source] += time.perf_counter() - began
        return FetchValue(tuple(failed), dict(seconds))

    # -- writing -----------------------------------------------------------------------------------

    def fill(self, fills: Iterable[Fill]) -> None:
        """Puts what has been fetched into its slots; what was fetched besides is forgotten."""
        self._write({(f.layer, f.slot): self._incoming[f.layer, f.slot] for f in fills})
        self._incoming.clear()

    def _write(self, weights: dict[tuple[int, int], Leaves]) -> None:
        by_member: dict[tuple[int, int], dict[tuple[int, int], Leaves]] = {}
        for (layer, slot), leaves in weights.items():
            *member, repeat = self._places[layer]
            by_member.setdefault(tuple(member), {})[repeat, slot] = leaves
        with self._lock:
            for (segment, member), rows in by_member.items():
                experts = self.local["segments"][segment][member]["moe"]["experts"]
                for i, name in enumerate(sorted(experts)):
                    mine = {at: leaves[i] for at, leaves in rows.items()}
                    experts[name] = self._written(experts[name], mine)

    def _written(self, leaf: jax.Array, rows: dict[tuple[int, int], np.ndarray]) -> jax.Array:
        """``leaf`` [repeats, slots, ...] with rows replaced."""
        if 2 * len(rows) >= leaf.shape[0] * leaf.shape[1]:
            whole = np.array(leaf)
            for at, row in rows.items():
                whole[at] = row
            return jax.device_put(whole, self.device)
        for (repeat, slot), row in rows.items():
            update = self._updating(leaf)
            leaf = update(leaf, row.astype(leaf.dtype), np.int32(repeat), np.int32(slot))
        return leaf

    def _updating(self, leaf: jax.Array) -> Callable[..., jax.Array]:
        """The compiled function that writes one row of a leaf, in place."""
        shape = "x".join(map(str, leaf.shape))
        kind = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        row = jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype)
        number = jax.ShapeDtypeStruct((), np.int32)
        lower = functools.partial(
            jax.jit(_update, donate_argnums=0).lower, kind, row, number, number
        )
        return self._programs.get(f"update-{leaf.dtype}-{shape}", [self.device], lower)

    def warm_up(self) -> None:
        """Has the functions ready that write slots."""
        for leaf, spec in zip(
            jax.tree.leaves(self.local), jax.tree.leaves(self.specs), strict=True
        ):
            if AXIS in spec:
                self._updating(leaf)

    def move(self, device: jax.Device) -> None:
        """Goes on, on another device of this process."""
        with self._lock:
            self.local, self.device = jax.device_put(self.local, device), device

    # -- damage, for experiments -------------------------------------------------------------------

    def damage(self, index: int, *, nan: bool) -> None:
        """Spoils the weights in a slot, counted over all layers: all of them become NaN, or one bit of them flips."""
        layer, slot = divmod(index % (len(self._places) * self._slots), self._slots)
        leaves = tuple(np.full_like(x, np.nan) if nan else x for x in self.read(layer, slot))
        if not nan:
            _flip(leaves[0])
        self._write({(layer, slot): leaves})

    def damage_backup(self, index: int) -> None:
        """Flips a bit of a copy in host memory, if there is one."""
        if self._backup:
            _flip(list(self._backup.values())[index % len(self._backup)][0])


def _flip(array: np.ndarray) -> None:
    array.reshape(-1).view(np.uint8)[0] ^= 1


def serve(listener: Listener, give: Callable[[int, int, int | None], Leaves | None]) -> None:
    """Answers other ranks' requests for weights, each connection on a thread of its own. Does not return."""
    while True:
        try:
            connection = listener.accept()
        except (OSError, EOFError, AuthenticationError):
            continue  # a peer that died meanwhile, or one that did not know the key
        threading.Thread(target=_answer, args=(connection, give), daemon=True).start()


def _answer(connection: Connection, give: Callable[[int, int, int | None], Leaves | None]) -> None:
    with connection:
        try:
            connection.send([give(*asked) for asked in connection.recv()])
        except (OSError, EOFError):
            pass  # the peer has died

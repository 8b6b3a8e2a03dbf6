"""Where valid copies of expert weights are, how fast each can be had, and how to tell that one arrived whole."""

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmoe.elastic.placement import Placement

if TYPE_CHECKING:
    from jaxmoe.elastic.repair import Move, Plan

IN_PLACE, PEER, HOST, CHECKPOINT = SOURCES = ("in place", "peer", "host", "checkpoint")
"""Kinds of sources, in the order in which they are tried."""


def checksum(leaves: Iterable[np.ndarray]) -> int:
    """The canary of an expert: CRC-32 over its leaves in the order given, their types and shapes included."""
    value = 0
    for leaf in leaves:
        value = zlib.crc32(f"{leaf.dtype} {leaf.shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), value)
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class Inventory:
    """Valid copies of every expert's weights. Describes memory, whoever is alive: plans filter by liveness.

    Hosts are memories outside the devices, numbered on their own: by default one per rank, in the rank's process.

    Attributes:
      held: int32 [layers, slots], the expert whose weights lie in each slot's device memory, -1 for none.
      host: bool [hosts, layers, experts], what each host keeps.
      host_owner: [hosts] the rank with which each host's memory is lost, -1 if it outlives all ranks.
      checkpoint: bool [layers, experts], what can be read from a checkpoint.
      expert_bytes: int64 [layers], size of one expert.
      canaries: int64 [layers, experts], the checksum that an expert's weights must have; None if none were taken.
    """

    held: Int[np.ndarray, "L S"]
    host: Bool[np.ndarray, "H L E"]
    host_owner: tuple[int, ...]
    checkpoint: Bool[np.ndarray, "L E"]
    expert_bytes: Int[np.ndarray, " L"]
    canaries: Int[np.ndarray, "L E"] | None = None

    def __post_init__(self):
        layers, experts = self.checkpoint.shape
        shapes = {
            "held": (self.held.shape[:1], (layers,)),
            "host": (self.host.shape[1:], (layers, experts)),
            "host_owner": ((len(self.host_owner),), self.host.shape[:1]),
            "expert_bytes": (self.expert_bytes.shape, (layers,)),
        }
        if self.canaries is not None:
            shapes["canaries"] = (self.canaries.shape, (layers, experts))
        for name, (got, expected) in shapes.items():
            if got != expected:
                raise ValueError(f"{name} must have dimensions {expected} here; got {got}.")
        if self.held.max(initial=-1) >= experts:
            raise ValueError(
                f"held must name experts below {experts}, or -1; got {self.held.max()}."
            )

    @classmethod
    def of(
        cls,
        placement: Placement,
        expert_bytes: int | Sequence[int],
        *,
        host: Bool[np.ndarray, "H L E"] | None = None,
        host_owner: Sequence[int] | None = None,
        checkpoint: bool | Bool[np.ndarray, "L E"] = False,
        canaries: Int[np.ndarray, "L E"] | None = None,
    ) -> "Inventory":
        """What there is when every slot holds what the placement says.

        Args:
          placement: the one that is loaded.
          expert_bytes: of one expert, the same in all layers or by layer.
          host: copies in host memory; default none.
          host_owner: default host r belongs to rank r.
          checkpoint: which experts can be read from a checkpoint, or all or none.
          canaries: expected checksums.
        """
        shape = (placement.layers, placement.experts)
        if host is None:
            host = np.zeros((placement.ranks, *shape), bool)
        return cls(
            placement.slot_expert,
            host,
            tuple(range(len(host)) if host_owner is None else host_owner),
            np.broadcast_to(np.asarray(checkpoint, bool), shape),
            np.broadcast_to(np.asarray(expert_bytes, np.int64), shape[:1]),
            canaries,
        )

    def without(self, ranks: Iterable[int], slots_per_rank: int) -> "Inventory":
        """The same after the processes of ``ranks`` ended: what their devices and hosts held is gone for good."""
        gone = list(ranks)
        held = self.held.reshape(len(self.held), -1, slots_per_rank).copy()
        held[:, gone] = -1
        host = self.host & ~np.isin(self.host_owner, gone)[:, None, None]
        return dataclasses.replace(self, held=held.reshape(self.held.shape), host=host)

    def after(self, plan: "Plan") -> "Inventory":
        """The same after all moves of a plan were made."""
        held = self.held.copy()
        for move in plan.moves:
            held[move.layer, move.slot] = move.expert
        return dataclasses.replace(self, held=held)

    def without_source(self, move: "Move") -> "Inventory":
        """The same without the copy that a move came from, because it turned out to be damaged; plan again with it."""
        if move.source in (IN_PLACE, PEER):
            held = self.held.copy()
            held[move.layer, move.source_slot] = -1
            return dataclasses.replace(self, held=held)
        if move.source == HOST:
            host = self.host.copy()
            host[move.source_rank, move.layer, move.expert] = False
            return dataclasses.replace(self, host=host)
        checkpoint = self.checkpoint.copy()
        checkpoint[move.layer, move.expert] = False
        return dataclasses.replace(self, checkpoint=checkpoint)


def host_backup(
    hosts: int, layers: int, experts: int, *, copies: int = 1
) -> Bool[np.ndarray, "H L E"]:
    """Which experts each host keeps, for ``Inventory.of``: an even share, and those of the next copies - 1 hosts.

    Raises:
      ValueError: if there are more copies than hosts.
    """
    if not 1 <= copies <= hosts:
        raise ValueError(
            f"copies must be from 1 to the number of hosts ({hosts}); got {copies}. A second copy on one host adds nothing."
        )
    first = np.arange(experts) * hosts // experts
    kept = (first - np.arange(hosts)[:, None]) % hosts < copies
    return np.repeat(kept[:, None], layers, axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Bandwidths:
    """How fast each link is, in bytes per second; 0 where nothing can be sent.

    Attributes:
      peer: [ranks, ranks] from a rank's device to another's; the diagonal is within a device.
      host: [hosts, ranks] from a host's memory to a rank's device.
      checkpoint: [ranks] from storage to each rank's device.
      latency_s: that any transfer takes, once for all that run at the same time.
    """

    peer: Float[np.ndarray, "R R"]
    host: Float[np.ndarray, "H R"]
    checkpoint: Float[np.ndarray, " R"]
    latency_s: float = 0.0

    def __post_init__(self):
        ranks = self.peer.shape[0]
        if self.peer.shape != (ranks, ranks) or self.host.shape[1:] != (ranks,):
            raise ValueError(
                f"peer must be [ranks, ranks] and host [hosts, ranks]; got {self.peer.shape} and {self.host.shape}."
            )
        if not (np.diagonal(self.peer) > 0).all():
            raise ValueError(
                f"peer must be > 0 on its diagonal, the bandwidth within a device; got {np.diagonal(self.peer).min()}."
            )
        if self.checkpoint.shape != (ranks,):
            raise ValueError(f"checkpoint must be [{ranks}]; got {self.checkpoint.shape}.")
        for name in ("peer", "host", "checkpoint"):
            values = getattr(self, name)
            if not (values >= 0).all():
                raise ValueError(f"{name} must be >= 0 bytes per second; got {values.min()}.")

    @classmethod
    def uniform(
        cls,
        ranks: int,
        *,
        hosts: int | None = None,
        local: float = 1e12,
        peer: float = 50e9,
        host: float = 25e9,
        checkpoint: float = 1e9,
        latency_s: float = 0.0,
    ) -> "Bandwidths":
        """The same for all links of a kind; ``hosts`` defaults to one per rank."""
        table = np.full((ranks, ranks), float(peer))
        np.fill_diagonal(table, local)
        hosts = ranks if hosts is None else hosts
        return cls(
            table,
            np.full((hosts, ranks), float(host)),
            np.full(ranks, float(checkpoint)),
            latency_s,
        )

    def of(self, source: str, source_rank: int | None, rank: int) -> float:
        """Bytes per second of one link."""
        if source in (IN_PLACE, PEER):
            return float(self.peer[source_rank, rank])
        if source == HOST:
            return float(self.host[source_rank, rank])
        return float(self.checkpoint[rank])

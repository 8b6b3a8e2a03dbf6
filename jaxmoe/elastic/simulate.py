"""How long recoveries take on machines that are not here: the real placement and repair modules, with a clock that is computed.

Two policies lose the same ranks. "eep" places everything anew on the survivors with EPLB before serving goes on, as the published
system does; "minimal" moves only orphaned experts, and restores the floor and evens out load while it serves. What is not
planned here (detection, agreement, tables) costs what ``Machine`` says.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from jaxmoe.elastic._eplb import eplb
from jaxmoe.elastic.inventory import Bandwidths, Inventory, host_backup
from jaxmoe.elastic.membership import Membership
from jaxmoe.elastic.placement import Placement, rebalance
from jaxmoe.elastic.repair import Plan, plan_moves, plan_repair, restore_floor


@dataclasses.dataclass(frozen=True)
class Machine:
    """A cluster and a model on it. Defaults: DeepSeek-V3's experts in FP8 on 32 GPUs, as in EEP's evaluation (arXiv 2605.10670).

    Attributes:
      ranks: one GPU each.
      ranks_per_node: neighbours with fast links.
      slots_per_rank: in each layer.
      layers: that have experts.
      experts: of a layer.
      expert_bytes: of one expert of one layer.
      within_node: bytes per second between two GPUs of a node, as long as all its ranks or none are lost: else as between nodes.
        That is inferred: per rank EEP moved experts twice as fast after losing whole nodes as after losing parts of one.
      between_nodes: bytes per second into or out of a GPU, as achieved; the default is fitted to EEP's runs, whose network could
        do 50e9.
      from_host: bytes per second out of a node's host memory; eight network cards of 50e9 each.
      host_latency_s: before weights come from host memory; EEP's took 2 s whether 1 or 40 percent came from there.
      detect_s: until a fault is noticed.
      agree_s: membership, tables and the rest, whatever moves.
    """

    ranks: int = 32
    ranks_per_node: int = 8
    slots_per_rank: int = 16
    layers: int = 58
    experts: int = 256
    expert_bytes: int = 3 * 7168 * 2048
    within_node: float = 150e9
    between_nodes: float = 7e9
    from_host: float = 400e9
    host_latency_s: float = 2.0
    detect_s: float = 1.0
    agree_s: float = 0.75

    def __post_init__(self):
        if self.ranks % self.ranks_per_node:
            raise ValueError(
                f"ranks must be a multiple of ranks_per_node ({self.ranks_per_node}); got {self.ranks}."
            )

    @property
    def nodes(self) -> int:
        """How many there are."""
        return self.ranks // self.ranks_per_node

    def bandwidths(self, lost: Sequence[int] = ()) -> Bandwidths:
        """The links once these ranks are lost; hosts are nodes."""
        node = np.arange(self.ranks) // self.ranks_per_node
        left = self.ranks_per_node - np.bincount(node[list(lost)], minlength=self.nodes)
        whole = left[node] == self.ranks_per_node
        near = (node[:, None] == node) & whole
        peer = np.where(near, self.within_node, self.between_nodes)
        np.fill_diagonal(peer, 1e12)
        host = np.full((self.nodes, self.ranks), self.from_host)
        return Bandwidths(peer, host, np.full(self.ranks, 1e9))

    def inventory(self, placement: Placement) -> Inventory:
        """Every expert once in the host memory of some node, which outlives its GPUs' processes."""
        kept = host_backup(self.nodes, self.layers, self.experts)
        return Inventory.of(placement, self.expert_bytes, host=kept, host_owner=[-1] * self.nodes)


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What one recovery took.

    Attributes:
      seconds: of the pause, by phase: detect, agree, peer, host.
      background_s: moves after serving went on: floor and rebalancing.
      shares: of the slots filled before serving went on, by kind of source. Under "eep" a rank's own expert in another slot,
        or in the same one, is "in place".
      moved_bytes: before serving went on.
      imbalance: load of the busiest rank over the mean, average of layers, when serving went on.
      final_imbalance: the same in the end.
    """

    seconds: dict[str, float]
    background_s: float
    shares: dict[str, float]
    moved_bytes: int
    imbalance: float
    final_imbalance: float

    @property
    def pause_s(self) -> float:
        """From the fault until serving went on."""
        return sum(self.seconds.values())


def draw_loads(
    machine: Machine, seed: int, *, sigma: float = 1.2, correlation: float = 0.5
) -> tuple[Float[np.ndarray, "L E"], Float[np.ndarray, "L E"]]:
    """Log-normal loads of experts when they were last placed, and now.

    With the defaults, EPLB's copies give EEP's published shares of sources for 1 to 16 lost ranks.

    Args:
      machine: whose model.
      seed: of the draw.
      sigma: of the loads' logarithm.
      correlation: between the logarithms then and now.
    """
    generator = np.random.default_rng(seed)
    then, noise = generator.normal(size=(2, machine.layers, machine.experts))
    now = correlation * then + np.sqrt(1 - correlation**2) * noise
    return np.exp(sigma * then), np.exp(sigma * now)


def recover(
    machine: Machine,
    lost: Sequence[int],
    policy: Literal["eep", "minimal"],
    *,
    seed: int = 0,
    floor: int = 2,
) -> Recovery:
    """Loses ranks and recovers.

    Args:
      machine: where.
      lost: ranks that end at the same time.
      policy: see the module.
      seed: of the loads.
      floor: of "minimal", if the slots are enough.

    Raises:
      CoverageLost: if the survivors can't hold the model.
    """
    if policy not in ("eep", "minimal"):
        raise ValueError(f'policy must be "eep" or "minimal"; got {policy!r}.')
    then, now = draw_loads(machine, seed)
    membership = Membership.initial(machine.ranks)
    if policy == "eep":
        placement = _plain_eplb(machine, membership, then)
    else:
        placement = rebalance(then, membership, machine.slots_per_rank, floor=floor)
    links = machine.bandwidths(lost)
    inventory = machine.inventory(placement).without(lost, machine.slots_per_rank)
    membership = membership.without(lost)
    if policy == "eep":
        new = _plain_eplb(machine, membership, now)
        plan = plan_moves(placement, new, membership, inventory, links)
        final, background_s = new, 0.0
    else:
        plan = plan_repair(placement, membership, inventory, links, load=now)
        inventory = inventory.after(plan)
        restored = restore_floor(
            plan.placement, membership, inventory, links, floor=floor, load=now
        )
        inventory = inventory.after(restored)
        final = rebalance(
            now, membership, machine.slots_per_rank, floor=floor, near=restored.placement
        )
        moves = plan_moves(restored.placement, final, membership, inventory, links)
        background_s = restored.seconds(links) + moves.seconds(links)
    return Recovery(
        _phases(machine, plan, links),
        background_s,
        _shares(machine, plan, membership, everything=policy == "eep"),
        sum(plan.bytes_by_source().values()),
        _imbalance(plan.placement, now, membership),
        _imbalance(final, now, membership),
    )


def lost_by_node(machine: Machine, count: int, seed: int) -> list[int]:
    """``count`` ranks to lose, node by node in random order: one after the other fills up with losses."""
    order = np.random.default_rng(seed).permutation(machine.nodes)
    size = machine.ranks_per_node
    return [int(order[i // size]) * size + i % size for i in range(count)]


def largest_loss(machine: Machine) -> int:
    """How many ranks can be lost before the slots of the others are too few."""
    return machine.ranks - -(-machine.experts // machine.slots_per_rank)


def _plain_eplb(machine: Machine, membership: Membership, load: np.ndarray) -> Placement:
    """EPLB's global policy on the active ranks."""
    ranks = list(membership.ranks)
    table = np.full((machine.layers, machine.ranks, machine.slots_per_rank), -1, np.int32)
    placed = eplb(load, len(ranks) * machine.slots_per_rank, ranks=len(ranks))
    table[:, ranks] = placed.reshape(machine.layers, len(ranks), -1)
    return Placement(table.reshape(machine.layers, -1), machine.experts, machine.ranks)


def _phases(machine: Machine, plan: Plan, links: Bandwidths) -> dict[str, float]:
    """The pause; kinds of sources come one after the other, as in EEP."""
    seconds = {"detect": machine.detect_s, "agree": machine.agree_s, "peer": 0.0, "host": 0.0}
    for kind in ("peer", "host"):
        moves = tuple(move for move in plan.moves if move.source == kind)
        if moves:
            fixed = machine.host_latency_s if kind == "host" else 0.0
            part = dataclasses.replace(plan, moves=moves)
            seconds[kind] = fixed + part.seconds(links)
    return seconds


def _shares(
    machine: Machine, plan: Plan, membership: Membership, *, everything: bool
) -> dict[str, float]:
    counts = {"in place": 0, "peer": 0, "host": 0, "checkpoint": 0}
    for move in plan.moves:
        counts[move.source] += 1
    if everything:
        slots = len(membership.ranks) * machine.slots_per_rank * machine.layers
        counts["in place"] += slots - len(plan.moves)  # those that did not even change slots
    total = sum(counts.values())
    return {kind: count / total if total else 0.0 for kind, count in counts.items()}


def _imbalance(placement: Placement, load: np.ndarray, membership: Membership) -> float:
    loads = placement.rank_load(load)[:, list(membership.ranks)]
    return float((loads.max(-1) / loads.mean(-1)).mean())

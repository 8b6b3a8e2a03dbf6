"""Elastic expert parallelism: membership, placement and repair as pure values and plans; ``simulate`` puts a clock to them."""

from jaxmoe.elastic._chunks import chunks
from jaxmoe.elastic._eplb import eplb
from jaxmoe.elastic.cluster.messages import Fault, Weights
from jaxmoe.elastic.cluster.options import ClusterOptions
from jaxmoe.elastic.cluster.processes import Cluster
from jaxmoe.elastic.cluster.status import ClusterStatus, Event, RankStatus, Verification
from jaxmoe.elastic.inventory import Bandwidths, Inventory, checksum, host_backup
from jaxmoe.elastic.membership import Fence, Ledger, Membership, StaleMembership
from jaxmoe.elastic.placement import CoverageLost, Placement, rebalance
from jaxmoe.elastic.repair import (
    Link,
    Move,
    Plan,
    plan_join,
    plan_moves,
    plan_repair,
    restore_floor,
)

__all__ = [
    "Bandwidths",
    "Cluster",
    "ClusterOptions",
    "ClusterStatus",
    "CoverageLost",
    "Event",
    "Fault",
    "Fence",
    "Inventory",
    "Ledger",
    "Link",
    "Membership",
    "Move",
    "Placement",
    "Plan",
    "RankStatus",
    "StaleMembership",
    "Verification",
    "Weights",
    "checksum",
    "chunks",
    "eplb",
    "host_backup",
    "plan_join",
    "plan_moves",
    "plan_repair",
    "rebalance",
    "restore_floor",
]

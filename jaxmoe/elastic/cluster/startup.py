"""The processes of a cluster: what each is told first, and the check that all have loaded the same model."""

import dataclasses
import logging
import math
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.elastic import distributed
from jaxmoe.elastic.cluster import programs
from jaxmoe.elastic.cluster.layout import Memory
from jaxmoe.elastic.cluster.messages import Setup, Weights
from jaxmoe.elastic.cluster.options import ClusterOptions
from jaxmoe.elastic.cluster.orders import Orders
from jaxmoe.elastic.cluster.shard import routed_layers
from jaxmoe.elastic.cluster.supervisor import Member, Supervisor
from jaxmoe.elastic.cluster.team import RankFailed
from jaxmoe.elastic.inventory import host_backup
from jaxmoe.elastic.membership import Membership
from jaxmoe.elastic.placement import Placement, rebalance
from jaxmoe.engine.runner import Sizes
from jaxmoe.params import Params, abstract_params

logger = logging.getLogger(__name__)

FLOOR = 2  # ranks that should hold each expert
_BACKUPS = 2  # hosts that keep each expert


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Startup:
    """Starts processes, all at once or one that returns.

    Args:
      weights: where they load the model from.
      config: the model.
      options: of the cluster.
      sizes: of steps.
      slots: for experts, per layer and rank.
      on_change: called, on any thread, when a process has ended, is ready, or has answered.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        options: ClusterOptions,
        sizes: Sizes,
        slots: int,
        on_change: Callable[[], None],
    ):
        self._weights, self._config, self._options = weights, config, options
        self._sizes, self._slots, self.on_change = sizes, slots, on_change
        self.capacity = options.ranks + options.spares
        self._folder = tempfile.TemporaryDirectory(prefix="jaxmoe-")
        self.supervisor: Supervisor | None = None
        self._service: Any = None

    def begin(self) -> tuple[dict[int, Member], Placement]:
        """Starts all processes; returns those that take part, with their experts in place, and the placement.

        Raises:
          RankFailed: if some do not start.
          ValueError: if they have loaded different weights.
        """
        options = self._options
        layers, experts = routed_layers(self._config), self._config.n_routed_experts
        membership = Membership.initial(options.ranks, capacity=self.capacity)
        placement = rebalance(np.ones((layers, experts)), membership, self._slots, floor=FLOOR)
        self._setup = self._setup_of(self._serve())
        first = dataclasses.replace(self._setup, initial=placement.slot_expert)
        self.supervisor = self._supervise(pathlib.Path(self._folder.name))
        try:
            for rank in range(self.capacity):  # spares begin like a rank that returns
                self.supervisor.launch(rank, first if rank < options.ranks else self._setup)
            members = self._wait_for(range(options.ranks))
            self._check_same(members)
        except BaseException:
            self.end()
            raise
        return members, placement

    def _serve(self) -> str:
        """Starts what ranks find each other by; its address."""
        coordinator = f"127.0.0.1:{_free_port()}"
        self._service = distributed.serve(coordinator, self.capacity)
        return coordinator

    def _supervise(self, folder: pathlib.Path) -> Supervisor:
        options = self._options
        return Supervisor(
            folder,
            self.on_change,
            silence_s=options.silence_s,
            start_s=options.start_s,
            devices=options.devices,
        )

    def orders(self) -> Orders:
        """Of meshes of these processes."""
        return Orders(self._options.devices)

    def launch(self, rank: int) -> None:
        """Starts a rank that joins later."""
        self.supervisor.launch(rank, self._setup)

    @property
    def largest_step(self) -> int:
        """Tokens of the largest step."""
        return self._sizes.step_tokens

    @property
    def memory(self) -> Memory:
        """What lies where, besides the devices."""
        params = abstract_params(self._config, self._weights.dtype)
        return Memory(self._setup.backup, self._canaries, _expert_bytes(params))

    def _setup_of(self, coordinator: str) -> Setup:
        options, layers = self._options, routed_layers(self._config)
        shape = (self.capacity, layers, self._config.n_routed_experts)
        backup = np.zeros(shape, bool)
        if options.host_backup:
            share = host_backup(options.ranks, *shape[1:], copies=min(_BACKUPS, options.ranks))
            backup = share[np.arange(self.capacity) % options.ranks]
        base = options.programs or str(pathlib.Path(self._folder.name) / "programs")
        shapes = (self.capacity, options.devices, self._slots, self._weights.dtype)
        return Setup(
            coordinator,
            self.capacity,
            options.devices,
            self._config,
            self._sizes,
            self._weights,
            self._slots,
            None,
            backup,
            self._folder.name,
            str(programs.folder_for(base, self._config, self._sizes, *shapes)),
            options.frozen,
        )

    def _wait_for(self, ranks: Iterable[int]) -> dict[int, Member]:
        """Takes the processes of these ranks when they are ready."""
        taken: dict[int, Member] = {}
        deadline = time.monotonic() + self._options.start_s
        while missing := set(ranks) - set(taken):
            for member in self.supervisor.ready:
                if member.rank in missing and self.supervisor.take(member):
                    taken[member.rank] = member
            if self.supervisor.given_up or time.monotonic() > deadline:
                for member in taken.values():
                    member.end()
                raise RankFailed(self.supervisor.given_up or missing)
            time.sleep(0.01)
        return taken

    def _check_same(self, members: dict[int, Member]) -> None:
        """Takes note of the weights' checksums, which must be the same everywhere."""
        first = next(iter(members.values())).ready
        self._canaries, self._trunk = first.canaries, first.trunk
        for rank, member in members.items():
            if not self.same(member):
                for each in members.values():
                    each.end()
                raise ValueError(
                    f"all ranks must load the same weights; those of rank {rank} differ from rank {min(members)}'s. "
                    "Name one checkpoint that does not change."
                )

    def same(self, member: Member) -> bool:
        """Whether a process has loaded what the first ones have."""
        canaries, trunk = member.ready.canaries, member.ready.trunk
        return np.array_equal(canaries, self._canaries) and trunk == self._trunk

    def end(self) -> None:
        """Ends all processes that nobody has taken, and the coordination service."""
        if self.supervisor is not None:
            self.supervisor.close()
        if self._service is not None:
            self._service.shutdown()
            self._service = None

    def close(self) -> None:
        """``end``, for good."""
        self.end()
        self._folder.cleanup()


def _expert_bytes(params: Params) -> int:
    """Of one expert."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.shape[2:])
        for segment in params["segments"]
        for member in segment
        if "moe" in member
        for leaf in member["moe"]["experts"].values()
    ) // sum("moe" in member for segment in params["segments"] for member in segment)

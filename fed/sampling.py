"""Who takes part in a round, who replies in time, and with how much work: a pure function of (seed, round).

Time here is simulated: a client's step lasts its FLOPs over its device's speed, a transfer its bytes over the bandwidth.
"""

import dataclasses
import heapq

import numpy as np

SAMPLERS = ("uniform", "size", "poisson", "capacity")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The fleet's behaviour.

    Attributes:
      participation: share of the clients that a round asks (with poisson: each one's probability; asynchronously: the share that
        trains at any time).
      sampler: uniform, size (by number of examples), poisson (each for itself; the rule that DP accounting assumes), capacity (by speed).
      dropout: probability that a client that was asked never replies.
      deadline_s: replies after it do not count; None waits for all.
      partial_work: a client that is too slow sends what it has at the deadline, instead of nothing.
      device_gflops: median speed of a device.
      speed_spread: sigma of the lognormal law of speeds; 0: all equal.
      bandwidth_mbps: of every client's link, up and down.
      quorum: replies that a round needs; with fewer it is skipped and nothing changes.
      buffer: asynchronous arrival (FedBuff): the server updates after this many replies, each from the version that it started on;
        0: rounds.
      staleness: replies that are older, in versions, do not count; a reply's weight is divided by sqrt(1 + its age).
    """

    participation: float = 1.0
    sampler: str = "uniform"
    dropout: float = 0.0
    deadline_s: float | None = None
    partial_work: bool = False
    device_gflops: float = 1.0
    speed_spread: float = 0.0
    bandwidth_mbps: float = 10.0
    quorum: int = 1
    buffer: int = 0
    staleness: int = 4

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}.")
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation must lie in (0, 1]; got {self.participation}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}.")
        for name in ("device_gflops", "bandwidth_mbps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name, least in (("speed_spread", 0), ("quorum", 1), ("buffer", 0), ("staleness", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if not self.speed_spread < float("inf"):
            raise ValueError(f"speed_spread must be finite; got {self.speed_spread}.")
        if self.deadline_s is not None and not 0 < self.deadline_s < float("inf"):
            raise ValueError(
                f"deadline_s must be positive and finite, or None to wait; got {self.deadline_s}."
            )
        if 0 < self.buffer < self.quorum:
            raise ValueError(
                f"quorum must be at most buffer={self.buffer}, the replies that come; got {self.quorum}."
            )
        if self.buffer and self.deadline_s is not None:
            raise ValueError(
                f"buffer={self.buffer} has no rounds, so deadline_s must be None; got {self.deadline_s}."
            )
        if self.partial_work and self.deadline_s is None:
            raise ValueError("partial_work needs a deadline_s; got None.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens in one round.

    Attributes:
      asked: clients that were sent a model; asynchronously, since the last update, one as often as it was.
      replied: clients whose reply counts, ascending.
      limits: most steps that each of ``replied`` did.
      dropped: clients that never replied.
      late: clients whose reply came too late.
      ages: versions between what each of ``replied`` started on and now; 0 but for asynchronous arrival.
      seconds: simulated time until the server went on.
    """

    asked: np.ndarray
    replied: np.ndarray
    limits: np.ndarray
    dropped: np.ndarray
    late: np.ndarray
    ages: np.ndarray
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Fleet:
    """What the plan needs to know of clients, by number.

    Attributes:
      sizes: examples [N].
      steps: steps of a whole local training [N].
      flops: of one step [N].
      transfer: bytes down and up [N].
    """

    sizes: np.ndarray
    steps: np.ndarray
    flops: np.ndarray
    transfer: np.ndarray

    def speeds(self, sampling: Sampling, seed: int) -> np.ndarray:
        """FLOP/s of each device."""
        generator = np.random.default_rng([seed, 0xDE7])
        drawn = np.exp(sampling.speed_spread * generator.standard_normal(len(self.sizes)))
        return sampling.device_gflops * 1e9 * drawn


def plan(sampling: Sampling, fleet: Fleet, seed: int, round_number: int) -> Plan:
    """The plan of a synchronous round. Empty clients are never asked."""
    generator = np.random.default_rng([seed, 0x5A3, round_number])
    speeds = fleet.speeds(sampling, seed)
    asked = _ask(sampling, fleet, speeds, generator)
    # Drawn for everybody, so that whether a client drops does not depend on who else was asked.
    gone = (generator.random(len(fleet.sizes)) < sampling.dropout)[asked]
    transfer = fleet.transfer[asked] * 8 / (sampling.bandwidth_mbps * 1e6)
    per_step = fleet.flops[asked] / speeds[asked]
    limits = fleet.steps[asked]
    finish = transfer + per_step * limits
    late = np.zeros(len(asked), bool)
    seconds = float(finish[~gone].max(initial=0.0))
    if sampling.deadline_s is not None:
        done = np.floor((sampling.deadline_s - transfer) / per_step).clip(0).astype(np.int64)
        late = finish > sampling.deadline_s
        if sampling.partial_work:
            limits, late = np.minimum(limits, done), done < 1
        waits = gone.any() or (finish > sampling.deadline_s).any()
        seconds = sampling.deadline_s if waits else seconds
    here = ~gone & ~late
    return Plan(
        asked,
        asked[here],
        limits[here],
        asked[gone],
        asked[late & ~gone],
        np.zeros(int(here.sum()), np.int64),
        seconds,
    )


def _ask(
    sampling: Sampling, fleet: Fleet, speeds: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    able = np.flatnonzero(fleet.sizes > 0)
    if sampling.sampler == "poisson":
        drawn = generator.random(len(fleet.sizes)) < sampling.participation
        return able[drawn[able]]
    count = max(1, round(sampling.participation * len(able)))
    if count == len(able):
        return able
    weights = {"uniform": np.ones(len(fleet.sizes)), "size": fleet.sizes, "capacity": speeds}
    chance = weights[sampling.sampler][able].astype(np.float64)
    return np.sort(generator.choice(able, count, replace=False, p=chance / chance.sum()))


def asynchronous(sampling: Sampling, fleet: Fleet, seed: int, updates: int) -> list[Plan]:
    """Plans of ``updates`` server steps with buffered asynchronous arrival, from an event simulation.

    A share of the clients trains at any time; who finishes is replaced by one that is idle, which starts on the newest version.
    """
    generator = np.random.default_rng([seed, 0xA5C])
    speeds = fleet.speeds(sampling, seed)
    able = np.flatnonzero(fleet.sizes > 0)
    busy = max(1, round(sampling.participation * len(able)))
    lasts = (
        fleet.transfer * 8 / (sampling.bandwidth_mbps * 1e6) + fleet.flops / speeds * fleet.steps
    )
    idle = list(generator.permutation(able))
    # (when it finishes, a number that breaks ties, client, version)
    running = [(lasts[k], i, int(k), 0) for i, k in enumerate(idle[:busy])]
    heapq.heapify(running)
    asked = [client for _, _, client, _ in running]
    idle, number, plans, before = idle[busy:], busy, [], 0.0
    for version in range(updates):
        arrived, dropped, late = {}, [], []
        while len(arrived) < min(sampling.buffer, len(able)):
            now, _, client, began = heapq.heappop(running)
            if generator.random() < sampling.dropout:
                dropped.append(client)
            elif version - began > sampling.staleness:
                late.append(client)
            else:
                arrived[client] = version - began
            # A client that has a reply in this buffer rests until the next one.
            idle.append(client)
            free = [k for k in idle if k not in arrived] or idle
            following = int(free[generator.integers(len(free))])
            idle.remove(following)
            heapq.heappush(running, (now + lasts[following], number, following, version))
            asked.append(following)
            number += 1
        clients = np.array(sorted(arrived))
        plans.append(
            Plan(
                np.array(asked, np.int64),
                clients,
                fleet.steps[clients],
                np.array(dropped, np.int64),
                np.array(late, np.int64),
                np.array([arrived[k] for k in clients.tolist()]),
                float(now - before),
            )
        )
        before, asked = now, []
    return plans

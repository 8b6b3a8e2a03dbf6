"""Random fault schedules: several episodes each, of all kinds, never more ranks at a time than the others can stand in for.

But for one kind of schedule, in which too many go at once: then requests have to end with an error that says what is missing,
and serving has to go on once ranks are back.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmoe.elastic.experiment.schedule import HOLDERS, Injection, Schedule

Rng = np.random.Generator
Episode = Callable[[Rng, list[int]], list[Injection]]  # of some ranks that it may end
_REFUSED = 1 / 12  # share of schedules in which too many ranks go


def _seconds(rng: Rng, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 2)


def _crash(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("kill", (ranks[0],))]


def _crash_inside_a_step(rng: Rng, ranks: list[int]) -> list[Injection]:
    point = str(rng.choice(["step", "computed", "committed"]))
    return [Injection("kill", (ranks[0],), point=point)]


def _hang(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("stop", (ranks[0],))]


def _short_hang(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("stop", (ranks[0],), seconds=_seconds(rng, 0.1, 1.0))]


def _zombie(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("stop", (ranks[0],), seconds=_seconds(rng, 3.0, 5.0))]


def _straggler(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("slow", (ranks[0],), seconds=_seconds(rng, 0.1, 1.0))]


def _flapping(rng: Rng, ranks: list[int]) -> list[Injection]:
    again = Injection("kill", (ranks[0],), after="joined", at_s=_seconds(rng, 0, 0.5))
    return [Injection("kill", (ranks[0],)), again]


def _one_after_another(rng: Rng, ranks: list[int]) -> list[Injection]:
    second = Injection("kill", (ranks[1],), after="lost", at_s=_seconds(rng, 0, 1.0))
    return [Injection("kill", (ranks[0],)), second]


def _during_repair(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("kill", (ranks[1],), point="install"), Injection("kill", (ranks[0],))]


def _joiner_on_its_way(rng: Rng, ranks: list[int]) -> list[Injection]:
    wait = _seconds(rng, 0, 4.0)
    joiner = Injection("kill_joiner", (ranks[0],), after="returning", at_s=wait)
    return [Injection("kill", (ranks[0],)), joiner]


def _joiner_while_joining(rng: Rng, ranks: list[int]) -> list[Injection]:
    point = str(rng.choice(["fetch", "install"]))
    joiner = Injection("kill", (ranks[0],), after="lost", point=point)
    return [Injection("kill", (ranks[0],)), joiner]


def _while_one_returns(rng: Rng, ranks: list[int]) -> list[Injection]:
    other = Injection("kill", (ranks[1],), after="returning", at_s=_seconds(rng, 0, 4.0))
    return [Injection("kill", (ranks[0],)), other]


def _cut(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("cut", (ranks[0],), point="step")]


def _mute(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("mute", (ranks[0],), seconds=_seconds(rng, 0.2, 4.0))]


def _damaged_host_copy(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("flip_host", (ranks[1],)), Injection("kill", (ranks[0],))]


def _damaged_slot(rng: Rng, ranks: list[int]) -> list[Injection]:
    joiner = Injection("flip", (ranks[0],), after="lost", point="fetch")
    return [Injection("kill", (ranks[0],)), joiner]


def _replay(rng: Rng, ranks: list[int]) -> list[Injection]:
    late = Injection("replay", (ranks[1],), after="lost", at_s=_seconds(rng, 0, 0.5))
    return [Injection("replay", (ranks[1],)), Injection("kill", (ranks[0],)), late]


def _cancellations(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("cancel", number=int(rng.integers(1, 4)))]


def _cancellations_amid_a_loss(rng: Rng, ranks: list[int]) -> list[Injection]:
    some = Injection("cancel", number=int(rng.integers(1, 4)))
    after = Injection("cancel", number=int(rng.integers(1, 4)), after="lost")
    return [some, Injection("kill", (ranks[0],)), after]


def _node(rng: Rng, ranks: list[int]) -> list[Injection]:
    return [Injection("kill", (ranks[0], ranks[1]))]


def _error_in_an_expert(rng: Rng, ranks: list[int]) -> list[Injection]:
    kind = str(rng.choice(["raise", "nan"]))
    return [Injection(kind, (ranks[0],), point="step")]


def _planned(rng: Rng, ranks: list[int]) -> list[Injection]:
    back = Injection("resume", (ranks[0],), after="draining", at_s=_seconds(rng, 0.5, 2.0))
    return [Injection("drain", (ranks[0],)), back]


def _loss_amid_a_planned_change(rng: Rng, ranks: list[int]) -> list[Injection]:
    loss = Injection("kill", (ranks[1],), after="draining", at_s=_seconds(rng, 0, 0.3))
    return [Injection("drain", (ranks[0],)), loss]


# (episode, ranks that it may end, how often it is drawn)
_EPISODES: list[tuple[Episode, int, int]] = [
    (_crash, 1, 3),
    (_crash_inside_a_step, 1, 4),
    (_hang, 1, 2),
    (_short_hang, 1, 1),
    (_zombie, 1, 1),
    (_straggler, 1, 2),
    (_flapping, 1, 2),
    (_one_after_another, 2, 2),
    (_during_repair, 2, 3),
    (_joiner_on_its_way, 1, 2),
    (_joiner_while_joining, 1, 2),
    (_while_one_returns, 2, 2),
    (_cut, 1, 2),
    (_mute, 1, 2),
    (_damaged_host_copy, 2, 2),
    (_damaged_slot, 1, 2),
    (_replay, 2, 2),
    (_cancellations, 1, 3),
    (_cancellations_amid_a_loss, 1, 3),
    (_node, 2, 2),
    (_error_in_an_expert, 1, 3),
    (_planned, 1, 2),
    (_loss_amid_a_planned_change, 2, 2),
]


def _refusal(rng: Rng, victims: list[int]) -> list[Injection]:
    """Too many go: at once, or one after another."""
    if rng.random() < 0.5:
        return [Injection("kill", tuple(victims))]
    first, *rest = victims
    return [
        Injection("kill", (first,)),
        *(Injection("kill", (rank,), after="lost") for rank in rest),
    ]


def draw(seed: int, ranks: int, spare_ranks: int) -> Schedule:
    """The schedule of a seed.

    Args:
      seed: also of the load.
      ranks: how many there are.
      spare_ranks: so many may be gone with every expert still having a slot somewhere; at least 1.
    """
    if spare_ranks < 1:
        raise ValueError(
            "--faults random: without any one rank the others must have slots for all experts; raise --redundant-experts."
        )
    rng = np.random.default_rng([seed, 17])
    order = [int(rank) for rank in rng.permutation(ranks)]
    at, injections = _seconds(rng, 0.2, 1.5), []
    refuses = spare_ranks + 1 < ranks and rng.random() < _REFUSED
    if refuses:
        episodes = [_cancellations, _refusal]
    elif rng.random() < 0.05 and spare_ranks >= HOLDERS:
        episodes = [lambda rng, ranks: [Injection("kill_holders")]]
    else:
        weights = np.array([w if need <= spare_ranks else 0 for _, need, w in _EPISODES], float)
        count = int(rng.integers(2, 5))
        chosen = rng.choice(len(_EPISODES), count, p=weights / weights.sum())
        episodes = [_EPISODES[i][0] for i in chosen]
    for episode in episodes:
        # The same few ranks over and over: what is out at a time stays within what the others can stand in for.
        victims = order[: spare_ranks + (1 if refuses else 0)]
        if not refuses:
            victims = [victims[i] for i in rng.permutation(len(victims))]
        for injection in episode(rng, victims):
            timed = injection.after is None and not injection.at_s
            injections.append(dataclasses.replace(injection, at_s=at) if timed else injection)
        at = round(at + _seconds(rng, 0.2, 2.0), 2)
    return Schedule(tuple(injections), seed, refuses)

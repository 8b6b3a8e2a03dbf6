"""The controller with ranks as threads: what processes cannot show quickly, with every token as if nothing had happened."""

import functools
import itertools
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
from engine import support

import jaxmoe
from jaxmoe.elastic import ClusterOptions, CoverageLost, Fault, Weights
from jaxmoe.elastic.cluster.virtual import VirtualCluster, _Hall
from jaxmoe.elastic.cluster.worker import CollectiveFailed
from jaxmoe.engine import Engine, EngineOptions, SamplingParams
from jaxmoe.errors import JaxMoeError

CONFIG = support.CONFIG.replace(num_hidden_layers=2)
EXPERTS = CONFIG.n_routed_experts
OPTIONS = EngineOptions(max_running=2, max_step_tokens=2, page_size=4, pages=24, max_length=48)
WAIT_S = 120  # a hang is a failure
PROMPTS = [[1, 2, 3, 4, 5], [9], [7, 7, 7], [200, 100, 50, 25], [3, 1], [5, 6, 7, 8, 9, 10]]


@functools.cache
def _undisturbed() -> list[tuple[int, ...]]:
    params = jaxmoe.init_params(CONFIG, jax.random.key(0))
    with Engine(params, CONFIG, options=OPTIONS) as engine:
        return [result.token_ids for result in engine.generate(PROMPTS, _sampling())]


def _sampling() -> SamplingParams:
    return SamplingParams(max_new_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def make(programs):
    """Makes clusters of two ranks and a spare, each rank with a slot for every expert but two."""
    engines = []

    def make(**kinds) -> tuple[Engine, VirtualCluster]:
        defaults = {"ranks": 3, "redundant_experts": 2 * EXPERTS - 6, "silence_s": 20.0}
        options = ClusterOptions(**{**defaults, **kinds}, programs=str(programs))
        cluster = VirtualCluster(Weights(None, seed=0), CONFIG, options)
        engines.append(Engine(None, CONFIG, options=OPTIONS, cluster=cluster))
        engines[-1].start()
        return engines[-1], cluster

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def serving(make):
    """One for the tests that leave it whole."""
    return make(spares=1)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def _under_load(engine: Engine, fault: Callable[[], None] = lambda: None) -> None:
    """Serves everything, with a fault once tokens flow; nothing may show it."""
    some = threading.Event()
    streams = [
        engine.submit(prompt, _sampling(), on_chunk=lambda chunk: some.set()) for prompt in PROMPTS
    ]
    assert some.wait(WAIT_S)
    fault()
    assert [s.result(WAIT_S).token_ids for s in streams] == _undisturbed()
    assert engine.stats().pages_held == 0


def _whole(cluster: VirtualCluster) -> None:
    """All take part again, hold what they should, and agree on it."""
    _until(lambda: len(cluster.active) == cluster.options.ranks and not cluster.pending())
    found = cluster.verify()
    assert set(found) == set(cluster.active)
    assert len({verification.digest for verification in found.values()}) == 1
    assert not any(verification.wrong for verification in found.values())
    epochs = [event.epoch for event in cluster.events]
    assert epochs == sorted(set(epochs))


def _since(cluster: VirtualCluster, before: int) -> list[str]:
    return [event.type for event in cluster.events[before:]]


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_rank_that_is_lost(serving):
    engine, cluster = serving
    _under_load(engine)
    spare = (set(range(4)) - set(cluster.active)).pop()
    lost = cluster.active[0]
    _under_load(engine, lambda: cluster.kill(lost))
    _whole(cluster)
    assert spare in cluster.active and lost not in cluster.active
    _until(lambda: cluster.status().ranks[lost].state == "ready")  # it is the spare now
    _under_load(engine)


@pytest.mark.parametrize("point", ["computed", "committed", "install"])
def test_a_rank_may_die_at_any_point(serving, point):
    engine, cluster = serving
    first, second = cluster.active[:2]
    cluster.inject(first, Fault(point, "kill"))
    _under_load(engine, lambda: point == "install" and cluster.kill(second))
    _whole(cluster)
    _under_load(engine)


def test_weights_that_were_not_written_are_not_believed_to_be_there(serving):
    engine, cluster = serving
    _under_load(engine)
    (spare,) = set(range(4)) - set(cluster.active)
    _until(lambda: cluster.status().ranks[spare].state == "ready")
    cluster.inject(spare, Fault("install", "raise"))  # it has its experts, but not in its slots
    _under_load(engine, lambda: cluster.kill(cluster.active[0]))
    _whole(cluster)
    _under_load(engine)


def test_an_old_message_of_a_process_that_waits_is_not_taken_for_an_answer(serving):
    engine, cluster = serving
    (spare,) = set(range(4)) - set(cluster.active)
    _until(lambda: cluster.status().ranks[spare].state == "ready")
    cluster.inject(spare, Fault("fetch", "replay"))
    _under_load(engine, lambda: cluster.kill(cluster.active[0]))
    _whole(cluster)


def test_a_joiner_that_dies_while_it_gets_its_experts_is_started_again(serving):
    engine, cluster = serving
    before = len(cluster.events)
    (spare,) = set(range(4)) - set(cluster.active)
    _until(lambda: cluster.status().ranks[spare].state == "ready")
    cluster.inject(spare, Fault("fetch", "kill"))
    _under_load(engine, lambda: cluster.kill(cluster.active[0]))
    _whole(cluster)
    assert _since(cluster, before).count("joined") == 1
    assert not cluster._controller._fetching  # nobody keeps the experts from being spread again
    _under_load(engine)


@pytest.mark.slow
def test_a_step_that_takes_too_long_costs_the_rank_that_does_not_come_out_of_it(make):
    engine, cluster = make(silence_s=2.0, deadline_s=5.0)
    slow, before = cluster.active[0], len(cluster.events)
    _under_load(engine, lambda: cluster.inject(slow, Fault("step", "sleep", seconds=40.0)))
    _whole(cluster)
    assert [e.ranks for e in cluster.events[before:] if e.type == "lost"] == [(slow,)]


@pytest.mark.slow
def test_a_rank_that_falls_silent_while_nothing_is_asked_is_noticed_before_the_next_request(make):
    engine, cluster = make(silence_s=1.0, respawn_delay_s=1.0)
    silent = cluster.active[0]
    cluster.inject(silent, Fault("now", "mute", seconds=WAIT_S))
    _until(lambda: silent not in cluster.active)
    _whole(cluster)
    lost, joined = (next(e for e in cluster.events if e.type == t) for t in ("lost", "joined"))
    assert lost.ranks == joined.ranks == (silent,)
    assert joined.at - lost.at > cluster.options.respawn_delay_s
    _under_load(engine)


def test_a_collective_that_fails_with_nobody_lost_is_tried_again(serving):
    engine, cluster = serving
    before = len(cluster.events)
    _under_load(engine, lambda: cluster.inject(cluster.active[1], Fault("step", "cut")))
    _under_load(engine, lambda: cluster.inject(cluster.active[0], Fault("step", "raise")))
    assert "lost" not in _since(cluster, before)
    _whole(cluster)


def test_a_rank_that_fails_by_itself_twice_in_a_row_is_lost(serving):
    engine, cluster = serving
    before, bad = len(cluster.events), cluster.active[0]

    def fault() -> None:
        for _ in range(2):
            cluster.inject(bad, Fault("computed", "raise"))
            cluster.inject(bad, Fault("step", "raise"))

    _under_load(engine, fault)
    _whole(cluster)
    (lost,) = [event for event in cluster.events[before:] if event.type == "lost"]
    assert lost.ranks == (bad,)


def test_weights_that_turn_into_nan_are_fetched_again_from_another_rank(serving):
    engine, cluster = serving
    before, bad = len(cluster.events), cluster.active[1]
    # In every slot of a layer: whatever tokens are routed to, some go through it.
    slots = cluster.status().ranks[bad].experts
    faults = [Fault("now", "nan", index=index) for index in range(slots)]
    _under_load(engine, lambda: [cluster.inject(bad, fault) for fault in faults])
    assert "repaired" in _since(cluster, before)
    _whole(cluster)
    _under_load(engine)


def test_a_late_answer_of_an_old_epoch_is_dropped_and_counted(serving):
    engine, cluster = serving
    rank, other = cluster.active[:2]
    _under_load(engine)
    before = sum(cluster.dropped.values())
    cluster.inject(rank, Fault("install", "replay"))  # its last answer belongs to the epoch before
    _under_load(engine, lambda: cluster.kill(other))
    _whole(cluster)
    assert sum(cluster.dropped.values()) > before


def test_a_drained_rank_leaves_without_a_request_noticing_and_can_be_resumed(make):
    engine, cluster = make()
    _under_load(engine, lambda: cluster.drain(1, timeout_s=0.0).result(WAIT_S))
    assert cluster.active == (0, 2)
    assert cluster.status().ranks[1].state == "drained"
    assert [event.type for event in cluster.events][0] == "drained"
    with pytest.raises(ValueError, match=r"rank must take part \(\[0, 2\]\) to be drained; got 1"):
        cluster.drain(1).result(WAIT_S)
    with pytest.raises(
        CoverageLost, match=f"without rank 0 the other 1 ranks have {EXPERTS - 2} slots"
    ):
        cluster.drain(0).result(WAIT_S)
    cluster.resume(1).result(WAIT_S)
    _under_load(engine)
    _whole(cluster)
    with pytest.raises(ValueError, match="rank must be out to be resumed; got 1"):
        cluster.resume(1).result(WAIT_S)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.2; got 3"):
        cluster.kill(3)


def test_what_is_waited_for_when_the_cluster_closes_is_said_not_to_come(make):
    engine, cluster = make()
    engine.close()
    with pytest.raises(JaxMoeError, match="the cluster is closed"):
        cluster.verify()
    with pytest.raises(JaxMoeError, match="the cluster is closed"):
        cluster.drain(0).result(WAIT_S)


def test_a_rank_that_dies_while_steps_are_compiled_does_not_hold_that_up(make):
    engine, cluster = make()
    cluster.inject(1, Fault("step", "kill"))  # in the empty step that ends it
    engine.warmup()
    assert 1 not in cluster.active or cluster.status().ranks[1].incarnation > 2
    _under_load(engine)
    _whole(cluster)


def test_a_part_of_a_rank_that_was_cut_off_is_not_computed_with():
    hall, ranks = _Hall(), (0, 1)
    failures = []

    def leave() -> None:
        try:
            hall.compute((0, 1), 0, ranks, (), lambda parts: {})
        except CollectiveFailed as error:
            failures.append(error)

    first = threading.Thread(target=leave, daemon=True)
    first.start()
    _until(lambda: 0 in hall._waiting)

    def compute(parts: dict[int, tuple]) -> dict:
        hall.cut(0)
        first.join(WAIT_S)
        return hall.launch(parts, ranks, lambda: pytest.fail("launched"))

    with pytest.raises(CollectiveFailed, match="some were cut off"):
        hall.compute((0, 1), 1, ranks, (), compute)
    assert len(failures) == 1


@pytest.mark.misuse
def test_what_a_dead_rank_finishes_late_takes_nothing_from_a_later_step():
    hall, found = _Hall(), {}

    def meet(rank: int) -> None:
        found[rank] = hall.compute((1, 2), rank, (1, 2), (), lambda parts: {1: "a", 2: "b"})

    threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in (1, 2)]

    def late(parts: dict[int, tuple]) -> dict:
        threads[0].start()
        _until(lambda: 1 in hall._waiting)
        return {0: None}

    hall.compute((0, 1), 0, (0,), (), late)
    threads[1].start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == {1: "a", 2: "b"}


def test_ranks_that_cannot_hold_all_experts_refuse_and_serve_again_when_others_return(make):
    engine, cluster = make(respawn=False)
    cluster.kill(0)
    _until(lambda: cluster.active == (1, 2))
    _under_load(engine)  # two have a slot for every expert
    cluster.kill(2)
    _until(lambda: cluster.active == (1,))
    *_, last = engine.stream([1, 2, 3], _sampling())
    assert last.finish_reason == "error" and "2 slots are missing per layer" in last.error
    assert cluster.status().min_copies == 0
    cluster.resume(0).result(WAIT_S)
    _until(lambda: cluster.refusal is None)
    _under_load(engine)
    cluster.resume(2).result(WAIT_S)
    _whole(cluster)
    _under_load(engine)


@pytest.mark.slow
def test_a_damaged_copy_in_host_memory_is_recognised_and_another_source_taken(make):
    engine, cluster = make(ranks=2, redundant_experts=0, host_backup=True)
    for index in range(2 * EXPERTS):
        cluster.inject(1, Fault("now", "flip_host", index=index))
    # Without redundancy rank 1 would have to take all experts, and has no room.
    cluster.kill(0)
    _until(lambda: cluster.refusal is not None)
    _until(lambda: cluster.refusal is None)
    _under_load(engine)
    _whole(cluster)


@pytest.mark.slow
def test_experts_are_spread_by_their_load_in_the_background(make):
    engine, cluster = make(redundant_experts=EXPERTS, chunk_moves=2)
    _under_load(engine)
    cluster.drain(1).result(WAIT_S)
    _under_load(engine)
    _until(lambda: not cluster.pending())
    assert "rebalanced" in [event.type for event in cluster.events]
    cluster.resume(1).result(WAIT_S)
    _until(lambda: cluster.status().min_copies == 2)
    _whole(cluster)
    _under_load(engine)


@pytest.mark.misuse
def test_what_a_thread_cannot_do_is_refused(make):
    _, cluster = make()
    with pytest.raises(ValueError, match="a thread can't be stopped"):
        cluster.inject(0, Fault("now", "stop"))
    with pytest.raises(ValueError, match="action must be one of kill, .*; got 'burn'"):
        Fault("now", "burn")
    few = len(jax.devices())
    with pytest.raises(
        ValueError, match=f"at most the {few} devices of this process; got {few + 1}"
    ):
        VirtualCluster(Weights(None), CONFIG, ClusterOptions(ranks=few + 1))


def test_the_order_of_a_mesh_is_never_used_twice_and_devices_change_when_orders_run_out():
    from jaxmoe.elastic.cluster.orders import Orders, OrdersExhausted

    orders = Orders(2)
    seen = [orders.fresh([0, 1]) for _ in range(8)]
    assert len(set(seen)) == 8 and {rank for order in seen for rank, _ in order} == {0, 1}
    moved = [
        sum(a != b for a, b in zip(sorted(x), sorted(y), strict=True))
        for x, y in itertools.pairwise(seen)
    ]
    assert moved == [0, 1, 0, 1, 0, 1, 0]  # as seldom as possible
    with pytest.raises(OrdersExhausted, match=r"ranks \[0, 1\] have been in every mesh"):
        orders.fresh([0, 1])
    assert orders.fresh([1]) == orders.fresh([1])  # alone there is nothing to remember
    assert np.array_equal(np.sort([rank for rank, _ in orders.fresh([2, 0, 1])]), [0, 1, 2])

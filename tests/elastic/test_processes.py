"""Ranks as real processes: killed, stopped and brought back under load, with every token as if nothing had happened."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
from engine import support

import jaxmoe
from jaxmoe.elastic.cluster.messages import Weights
from jaxmoe.elastic.cluster.options import ClusterOptions
from jaxmoe.elastic.cluster.processes import Cluster
from jaxmoe.engine import Engine, EngineOptions, SamplingParams

CONFIG = support.CONFIG.replace(num_hidden_layers=2)
RANKS = 3
OPTIONS = EngineOptions(max_running=4, max_step_tokens=8, page_size=4, pages=40, max_length=96)
WAIT_S = 120  # a hang is a failure

# Kills are in `make test` too: test_faults.py, and over HTTP serve/test_ranks.py.
pytestmark = pytest.mark.slow


@functools.cache
def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, int(rng.integers(1, 40))).tolist() for _ in range(12)]


def _samplings() -> list[SamplingParams]:
    ways = [{}, {"temperature": 1.0, "seed": 3}, {"logprobs": 1}, {"frequency_penalty": 1.0}]
    return [SamplingParams(max_new_tokens=40, ignore_eos=True, **ways[i % 4]) for i in range(12)]


@functools.cache
def _undisturbed() -> list[tuple[int, ...]]:
    params = jaxmoe.init_params(CONFIG, jax.random.key(0))
    with Engine(params, CONFIG, options=OPTIONS) as engine:
        return [result.token_ids for result in engine.generate(_prompts(), _samplings())]


@pytest.fixture(scope="module")
def serving(programs):
    """One cluster for all tests; each leaves it with all ranks back."""
    # So many copies that one rank alone has a slot for every expert.
    options = ClusterOptions(
        ranks=RANKS, redundant_experts=2 * CONFIG.n_routed_experts, programs=str(programs)
    )
    cluster = Cluster(Weights(None, seed=0), CONFIG, options)
    with Engine(None, CONFIG, options=OPTIONS, cluster=cluster) as engine:
        engine.warmup()
        yield engine, cluster
        pids = [*cluster.pids.values(), *cluster.starting_pids.values()]
    assert not any(map(_lives, pids))  # no orphans


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _under_load(engine: Engine, fault: Callable[[], None]) -> None:
    """Serves everything, with a fault once tokens flow; nothing may show it."""
    some = threading.Event()
    expected = _undisturbed()
    streams = [
        engine.submit(prompt, sampling, on_chunk=lambda chunk: some.set())
        for prompt, sampling in zip(_prompts(), _samplings(), strict=True)
    ]
    assert some.wait(WAIT_S)
    fault()
    results = [stream.result(WAIT_S) for stream in streams]
    assert [result.finish_reason for result in results] == ["length"] * len(results)
    assert [result.token_ids for result in results] == expected
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)


def _whole(engine: Engine, cluster: Cluster) -> None:
    _until(lambda: len(cluster.active) == RANKS)


def _compiles(cluster: Cluster, but: int) -> dict[int, int]:
    return {r.rank: r.compiles for r in cluster.status().ranks if r.rank != but}


def _kill(cluster: Cluster, rank: int, number: int = signal.SIGKILL) -> None:
    os.kill(cluster.pids[rank], number)


def test_without_faults_processes_give_the_tokens_of_one_device(serving):
    engine, _ = serving
    _under_load(engine, lambda: None)


def test_a_killed_rank_costs_no_request_no_token_and_no_compilation(serving):
    engine, cluster = serving
    rank = 0
    compiled = _compiles(cluster, rank)
    epoch = engine.stats().epoch
    _under_load(engine, lambda: _kill(cluster, rank))
    (lost,) = [event for event in cluster.events if event.type == "lost" and event.epoch > epoch]
    assert lost.ranks == (rank,)
    _whole(engine, cluster)
    _under_load(engine, lambda: None)  # with the rank that has returned
    assert _compiles(cluster, rank) == compiled
    assert engine.stats().epoch >= epoch + 2


def test_a_rank_that_dies_while_nothing_runs_is_missed_and_returns(serving):
    engine, cluster = serving
    before = len(cluster.events)
    _kill(cluster, 1)
    _until(lambda: "joined" in [event.type for event in cluster.events[before:]])
    assert [event.type for event in cluster.events[before:]][:2] == ["lost", "joined"]
    _under_load(engine, lambda: None)


def test_a_rank_that_stops_is_fenced_and_replaced(serving):
    engine, cluster = serving
    pid = cluster.pids[1]
    _under_load(engine, lambda: _kill(cluster, 1, signal.SIGSTOP))
    assert not _lives(pid)  # it cannot come back and act on old orders
    _whole(engine, cluster)
    _under_load(engine, lambda: None)


def test_a_rank_that_dies_again_on_its_way_back_is_started_once_more(serving):
    engine, cluster = serving
    _kill(cluster, 1)
    _until(lambda: cluster.starting_pids)
    cluster.kill(1)
    _whole(engine, cluster)
    assert len(cluster.active) == RANKS
    _under_load(engine, lambda: None)


def test_two_ranks_killed_one_after_the_other(serving):
    engine, cluster = serving

    def fault() -> None:
        _kill(cluster, 0)
        time.sleep(0.05)
        _kill(cluster, 2)

    _under_load(engine, fault)
    _whole(engine, cluster)


@pytest.mark.misuse
def test_options_that_make_no_cluster_are_refused():
    with pytest.raises(ValueError, match="ranks must be >= 1; got 0"):
        ClusterOptions(ranks=0)
    with pytest.raises(ValueError, match="redundant_experts must be >= 0; got -1"):
        ClusterOptions(redundant_experts=-1)
    dense = jaxmoe.presets["llama3_1b"]
    with pytest.raises(ValueError, match="a cluster shares experts; this model has none"):
        Cluster(Weights(None), dense)

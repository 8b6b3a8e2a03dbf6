"""The dashboard without a browser: figures from counters and events, the stream, the page's promises."""

import base64
import dataclasses
import gc
import hashlib
import importlib.resources
import json
import re
import threading
import time

import httpx2
import numpy as np
import pytest
from live_server import live_server
from starlette.applications import Starlette

from jaxmoe.engine import EngineStats
from jaxmoe.serve import dashboard
from jaxmoe.serve.dashboard.feed import Feed
from jaxmoe.serve.dashboard.window import Aggregator, Window, expert_ranks, percentiles

STATS = EngineStats(
    waiting=0,
    running=0,
    preemptions=0,
    steps=0,
    prompt_tokens=0,
    cached_tokens=0,
    generated_tokens=0,
    drafted_tokens=0,
    accepted_tokens=0,
    finished={},
    pages=8,
    pages_held=0,
    pages_idle=0,
    step_s=0.0,
    schedule_s=0.0,
    expert_load=np.zeros((0, 0), np.int64),
    ranks=2,
    epoch=0,
    rank_experts=[[0, 1], [2, 3]],
    draining=False,
)


class StillEngine:
    """As much of an engine as the dashboard uses, with figures set by the test."""

    cluster = None

    def __init__(self, **figures):
        self.figures = STATS
        self.set(**figures)
        self.callbacks = []

    def set(self, **figures):
        self.figures = dataclasses.replace(self.figures, **figures)

    def stats(self):
        return self.figures

    def subscribe(self, callback):
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)


def finished(tpot_s):
    return {"type": "finished", "request_id": "r", "reason": "stop", "tpot_s": tpot_s}


# -- figures -----------------------------------------------------------------------------------------------------------


def test_percentiles_are_linear_between_neighbours_and_none_without_values():
    assert percentiles([]) is None
    values = list(range(101))
    assert percentiles(values) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_a_window_forgets_what_is_older_and_what_is_too_much():
    window = Window(10.0, most=3)
    for now in range(5):
        window.add(float(now), now)
    assert window.values(5.0) == [2, 3, 4]
    assert window.values(13.5) == [4]
    assert window.values(100.0) == []


def test_rates_are_differences_of_counters_over_time():
    aggregator = Aggregator()
    first = aggregator.sample(10.0, 1000.0, STATS)
    assert first["throughput"] == {"output": None, "prompt": None, "cached": None}
    later = dataclasses.replace(STATS, generated_tokens=50, prompt_tokens=300, cached_tokens=100)
    assert aggregator.sample(12.0, 1002.0, later)["throughput"] == {
        "output": 25.0,
        "prompt": 150.0,
        "cached": 50.0,
    }
    assert [point[0] for point in aggregator.timeline] == [1000.0, 1002.0]


def test_latency_percentiles_cover_the_window_only():
    aggregator = Aggregator(latency_s=60)
    aggregator.event(0.0, {"type": "first_token", "request_id": "r", "seconds": 9.0})
    aggregator.event(50.0, {"type": "first_token", "request_id": "r", "seconds": 1.0})
    aggregator.event(50.0, finished(0.25))
    aggregator.event(50.0, finished(None))  # one token has no time per further token
    aggregator.event(50.0, {"type": "something new"})
    latency = aggregator.sample(70.0, 0.0, STATS)["latency"]
    assert latency["ttft"]["p99"] == 1.0 and latency["ttft_count"] == 1
    assert latency["tpot"]["p50"] == 0.25 and latency["tpot_count"] == 1


def test_load_is_the_windows_and_summed_over_layers():
    aggregator = Aggregator(load_s=60)
    loads = {0.0: 0, 50.0: 10, 100.0: 30}
    for now, value in loads.items():
        load = np.full((3, 4), value, np.int64)
        snapshot = aggregator.sample(now, now, dataclasses.replace(STATS, expert_load=load))
    ranks = snapshot["load"]["ranks"]
    assert [rank["experts"] for rank in ranks] == [[0, 1], [2, 3]]
    assert ranks[0]["recent"] == [60.0, 60.0]  # since second 50
    assert ranks[1]["total"] == [90.0, 90.0]


def test_copies_of_an_expert_share_its_load():
    ranks = expert_ranks([[0, 1], [0]], np.array([10, 4]), np.array([100, 40]))
    assert ranks[0]["recent"] == [5.0, 4.0]
    assert ranks[1] == {"experts": [0], "recent": [5.0], "total": [50.0]}


def test_an_engine_before_its_first_step_and_one_without_experts_have_snapshots():
    fresh = Aggregator().sample(0.0, 0.0, STATS)
    assert fresh["load"]["ranks"][0]["total"] == [0.0, 0.0]
    assert fresh["latency"]["ttft"] is None and fresh["step_s"] is None
    dense = Aggregator().sample(0.0, 0.0, dataclasses.replace(STATS, rank_experts=[[]], ranks=1))
    assert dense["load"]["ranks"] == [{"experts": [], "recent": [], "total": []}]
    json.dumps([fresh, dense], allow_nan=False)


# -- stream ------------------------------------------------------------------------------------------------------------


def app_of(engine, **options):
    return Starlette(routes=dashboard.routes(engine, interval_s=0.05, **options))


def read_events(lines, count):
    """The next events of a stream as (name, data)."""
    events, name = [], None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            events.append((name, json.loads(line.removeprefix("data: "))))
            if len(events) == count:
                break
    return events


def test_a_viewer_gets_the_history_and_then_what_changes():
    engine = StillEngine(generated_tokens=5, running=2)
    with live_server(app_of(engine)) as url:
        time.sleep(0.3)
        with httpx2.stream("GET", f"{url}/events", timeout=5) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            (name, hello), (_, first) = read_events(lines, 2)
            assert name == "hello" and len(hello["timeline"]) >= 3
            assert first["running"] == 2 and first["totals"]["generated"] == 5
            engine.set(running=7, waiting=1)
            _, _, (_, later) = read_events(lines, 3)
            assert later["running"] == 7 and later["waiting"] == 1
            assert later["time"] > first["time"]


def test_viewers_are_bounded_and_places_come_back_when_they_leave():
    engine = StillEngine()
    with live_server(app_of(engine, most_viewers=2)) as url, httpx2.Client(timeout=5) as client:
        for _ in range(3):
            with client.stream("GET", f"{url}/events") as one:
                with client.stream("GET", f"{url}/events") as two:
                    assert one.status_code == two.status_code == 200
                    refused = client.get(f"{url}/events")
                    assert refused.status_code == 503 and "retry-after" in refused.headers
            deadline = time.monotonic() + 5
            while client.get(f"{url}/").status_code and time.monotonic() < deadline:
                with client.stream("GET", f"{url}/events") as again:
                    if again.status_code == 200:
                        break
                time.sleep(0.02)
            assert again.status_code == 200
            time.sleep(0.3)


def test_a_viewer_who_does_not_read_loses_the_place(monkeypatch):
    """The engine's figures are made large, so that the sockets' buffers fill up soon."""
    monkeypatch.setattr("jaxmoe.serve.dashboard.feed._SEND_TIMEOUT_S", 0.5)
    experts = [list(range(100_000))]
    engine = StillEngine(rank_experts=experts, expert_load=np.ones((1, 100_000), np.int64))
    feeds = []
    keep = lambda *args, **kwargs: feeds.append(Feed(*args, **kwargs)) or feeds[-1]  # noqa: E731
    monkeypatch.setattr("jaxmoe.serve.dashboard.Feed", keep)
    with live_server(app_of(engine)) as url:
        with httpx2.stream("GET", f"{url}/events", timeout=5):
            deadline = time.monotonic() + 20
            while not feeds[0].viewers and time.monotonic() < deadline:
                time.sleep(0.02)
            while feeds[0].viewers and time.monotonic() < deadline:
                time.sleep(0.05)
            assert feeds[0].viewers == 0
    feeds[0].close()


def test_streams_end_when_the_engine_has_drained_so_that_the_server_can_stop():
    engine = StillEngine(draining=True, running=1)
    with live_server(app_of(engine)) as url:
        with httpx2.stream("GET", f"{url}/events", timeout=5) as response:
            lines = response.iter_lines()
            read_events(lines, 4)
            engine.set(running=0)
            name, last = read_events(lines, 100)[-1]
            assert last["draining"] and last["running"] == 0


def test_streams_end_when_the_server_says_that_it_stops():
    stop = []
    app = app_of(StillEngine(), stopping=lambda: bool(stop))
    with live_server(app) as url, httpx2.stream("GET", f"{url}/events", timeout=5) as response:
        lines = response.iter_lines()
        read_events(lines, 3)
        stop.append(True)
        assert len(read_events(lines, 1000)) < 1000


def test_the_thread_ends_when_engine_and_feed_are_gone():
    def threads():
        return [t for t in threading.enumerate() if t.name == "dashboard"]

    before = set(threads())
    feed = Feed(StillEngine(), interval_s=0.01)
    (thread,) = set(threads()) - before
    del feed
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_viewer_is_told_when_the_engine_does_not_answer():
    engine, answer = StillEngine(), threading.Event()
    app = app_of(engine)
    engine.stats = lambda: answer.wait(10) and engine.figures
    with live_server(app) as url, httpx2.stream("GET", f"{url}/events", timeout=5) as response:
        lines = response.iter_lines()
        assert any(line.startswith(": ") for line in lines)
        answer.set()
        assert read_events(lines, 1)[0][0] == "snapshot"


def test_closing_the_feed_ends_its_subscription():
    engine = StillEngine()
    feed = Feed(engine, interval_s=0.01)
    assert len(engine.callbacks) == 1
    feed.close()
    assert not engine.callbacks


# -- page --------------------------------------------------------------------------------------------------------------


def test_the_page_names_no_other_server_and_its_policy_forbids_any():
    html, headers = dashboard.page()
    addresses = set(re.findall(r"https?://[^\s'\")]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name space, never fetched
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


@pytest.mark.parametrize("name", ["dashboard.html", "dashboard.css", "dashboard.js", "ranks.js"])
def test_the_page_lies_in_the_package(name):
    assert importlib.resources.files("jaxmoe.serve.dashboard").joinpath(name).is_file()


def test_the_page_never_writes_markup():
    """Names of ranks, reasons and the like are only ever text."""
    html, _ = dashboard.page()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", html)

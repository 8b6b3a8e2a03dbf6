"""Metrics for Prometheus, in a registry of their own: two servers in one process do not mix."""

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxmoe.elastic import Cluster
from jaxmoe.engine import Engine, EngineStats
from jaxmoe.serve.ranks import TAKING_PART

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_RECENT = 64  # requests whose durations tell when to try again


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"jaxmoe_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"jaxmoe_{name}", text, value=value)


def _expert_load(load: np.ndarray) -> Metric:
    text = "Tokens that each expert has computed, by layer with experts."
    family = CounterMetricFamily("jaxmoe_expert_tokens", text, labels=("layer", "expert"))
    for layer, row in enumerate(load.tolist()):
        for expert, tokens in enumerate(row):
            family.add_metric((str(layer), str(expert)), tokens)
    return family


def _families(stats: EngineStats) -> Iterator[Metric]:
    """What the engine counts itself."""
    yield _gauge("requests_waiting", "Requests without cache pages.", stats.waiting)
    yield _gauge("requests_running", "Requests with cache pages.", stats.running)
    yield _counter("preemptions", "Times a request's pages were taken away.", stats.preemptions)
    yield _counter("steps", "Steps of the engine.", stats.steps)
    text = (
        "Planned steps by the SEFP width of their requests; weights that are not in SEFP have none."
    )
    widths = CounterMetricFamily("jaxmoe_width_steps", text, labels=("width",))
    for width, count in stats.width_steps.items():
        if width is not None:
            widths.add_metric((str(width),), count)
    yield widths
    yield _counter("prompt_tokens", "Tokens of prompts of started requests.", stats.prompt_tokens)
    yield _counter("cached_tokens", "Of those, not computed again.", stats.cached_tokens)
    text = "Sampled tokens, stop tokens included."
    yield _counter("generated_tokens", text, stats.generated_tokens)
    text = "Tokens guessed ahead and computed."
    yield _counter("drafted_tokens", text, stats.drafted_tokens)
    yield _counter("accepted_tokens", "Of those, right.", stats.accepted_tokens)
    text = "Ended requests by reason."
    finished = CounterMetricFamily("jaxmoe_requests_finished", text, labels=("reason",))
    for reason, count in stats.finished.items():
        finished.add_metric((reason,), count)
    yield finished
    text = "Cache pages: held by requests, idle (kept for prompts that begin alike) and free."
    pages = GaugeMetricFamily("jaxmoe_cache_pages", text, labels=("state",))
    free = stats.pages - stats.pages_held - stats.pages_idle
    for state, count in (("held", stats.pages_held), ("idle", stats.pages_idle), ("free", free)):
        pages.add_metric((state,), count)
    yield pages
    yield _gauge("step_seconds", "Smoothed time of a step.", stats.step_s)
    yield _gauge("schedule_seconds", "Of that, outside compiled functions.", stats.schedule_s)
    yield _gauge("ranks", "Ranks that there can be.", stats.ranks)
    yield _gauge("epoch", "Epoch of the membership.", stats.epoch)
    text = "Experts in each rank's slots."
    held = GaugeMetricFamily("jaxmoe_rank_experts", text, labels=("rank",))
    for rank, experts in enumerate(stats.rank_experts):
        held.add_metric((str(rank),), len(experts))
    yield held
    yield _gauge("draining", "1 while new requests are refused.", float(stats.draining))
    yield _expert_load(stats.expert_load)


def _cluster_families(cluster: Cluster) -> Iterator[Metric]:
    """What ranks with processes of their own add."""
    status, events = cluster.status(), list(cluster.events)
    up = GaugeMetricFamily("jaxmoe_rank_up", "1 for ranks that take part.", labels=("rank",))
    text = "Programs that XLA has compiled in a rank's present process."
    compiles = GaugeMetricFamily("jaxmoe_rank_compiles", text, labels=("rank",))
    for rank in status.ranks:
        up.add_metric((str(rank.rank),), float(rank.state in TAKING_PART))
        compiles.add_metric((str(rank.rank),), rank.compiles)
    yield from (up, compiles)
    yield _gauge("ranks_active", "Ranks that take part.", len(cluster.active))
    yield _gauge("expert_copies_min", "Copies of the expert that has fewest.", status.min_copies)
    text = "1 while experts are missing and nothing can be served."
    yield _gauge("coverage_lost", text, float(status.refusal is not None))
    changes, stood, spent = collections.Counter(), collections.Counter(), collections.Counter()
    for event in events:
        changes[event.type] += 1
        stood[event.type] += event.seconds
        for phase, seconds in event.phases.items():
            spent[event.type, phase] += seconds
    text = "Changes of the ranks that take part, by type: lost, joined, drained and others."
    yield _by(("type",), "rank_changes", text, {(kind,): n for kind, n in changes.items()})
    text = "Seconds that serving stood still for changes, by their type."
    yield _by(("type",), "rank_change_seconds", text, {(kind,): s for kind, s in stood.items()})
    text = "Of that, seconds by phase."
    yield _by(("type", "phase"), "rank_change_phase_seconds", text, spent)
    text = "Ranks' messages that did not count, by kind and reason: of another epoch or process."
    dropped = {(reason,): count for reason, count in status.dropped.items()}
    yield _by(("reason",), "dropped_messages", text, dropped)


def _by(
    labels: tuple[str, ...], name: str, text: str, values: Mapping[tuple[str, ...], float]
) -> Metric:
    family = CounterMetricFamily(f"jaxmoe_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


class Metrics:
    """All metrics of one server.

    Args:
      engine: asked at every scrape; its events fill the histograms.

    Attributes:
      registry: for more metrics.
    """

    def __init__(self, engine: Engine):
        self.registry = prometheus_client.CollectorRegistry()
        self._engine = engine
        self._first_token = prometheus_client.Histogram(
            "jaxmoe_time_to_first_token_seconds",
            "From submission to the first token.",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self._per_token = prometheus_client.Histogram(
            "jaxmoe_time_per_output_token_seconds",
            "Mean time between a request's tokens after the first.",
            buckets=_TPOT_BUCKETS,
            registry=self.registry,
        )
        self._responses = prometheus_client.Counter(
            "jaxmoe_http_responses",
            "Responses by route and status.",
            ("path", "status"),
            registry=self.registry,
        )
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self.registry.register(self)
        self.close = engine.subscribe(self._on_event)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are in what ``collect`` gives, and registering need not count."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The engine's counters of this moment."""
        yield from _families(self._engine.stats())
        if self._engine.cluster is not None:
            yield from _cluster_families(self._engine.cluster)

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["type"] == "first_token":
            self._first_token.observe(event["seconds"])
        elif event["type"] == "finished":
            if event["tpot_s"] is not None:
                self._per_token.observe(event["tpot_s"])
                total = event["ttft_s"] + event["tpot_s"] * (event["output_tokens"] - 1)
                self._recent.append(total)

    def responded(self, path: str, status: int) -> None:
        """Counts a response; ``path`` must be one of few."""
        self._responses.labels(path, str(status)).inc()

    def retry_after_s(self) -> int:
        """When a place in a full queue is likely to be free: a recent request's mean time over those running."""
        recent = list(self._recent)
        mean = sum(recent) / len(recent) if recent else 1.0
        running = max(self._engine.stats().running, 1)
        return int(min(max(mean / running, 1), 60))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return prometheus_client.generate_latest(self.registry)

"""What a jaxmoe server counted itself, from ``/metrics``, against what the client counted."""

import asyncio
import contextlib
import statistics
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from bench._load import Record, Run

_POLL_S = 0.5  # between looks at the server's queue
_SLACK_S = 0.005  # two clocks and two threads

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    """Samples of a scrape: {(name, sorted labels): value}."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _sum(samples: Samples, name: str, **labels: str) -> float:
    """Over all samples of a name with these labels."""
    wanted = set(labels.items())
    return sum(v for (n, own), v in samples.items() if n == name and wanted <= set(own))


def growth(before: Samples, after: Samples) -> Samples:
    """How much every sample grew."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


@contextlib.asynccontextmanager
async def watch_queue(
    scrape: Callable[[], Any], run: Run, differences: list[int]
) -> AsyncIterator[None]:
    """Meanwhile collects: requests that the client waits for, minus those that the server has."""

    async def poll() -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            before = run.in_flight
            samples = await scrape()
            server = _sum(samples, "jaxmoe_requests_running") + _sum(
                samples, "jaxmoe_requests_waiting"
            )
            # Between the two looks at the client's count any value in between is right.
            low, high = sorted((before, run.in_flight))
            differences.append(int(min(max(server, low), high) - server))

    task = asyncio.create_task(poll())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _load_check(grown: Samples, computed: float) -> tuple[str, float, float] | None:
    """Expert visits over computed tokens: the same whole number in every layer, if nothing was computed twice."""
    layers = {dict(own)["layer"] for (n, own) in grown if n == "jaxmoe_expert_tokens_total"}
    if not layers or computed <= 0:
        return None
    visits = [_sum(grown, "jaxmoe_expert_tokens_total", layer=layer) for layer in sorted(layers)]
    per_token = round(visits[0] / computed)
    name = "expert visits, against tokens x experts per token x layers"
    return name, per_token * computed * len(layers), sum(visits)


def compare(
    records: Sequence[Record], grown: Samples, differences: Sequence[int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Report rows (client's and server's figure) and a line for each that disagrees.

    Only this client may have used the server, and every request must have ended well: else they do disagree.
    """
    ok = [r for r in records if r.outcome == "ok"]
    generated = _sum(grown, "jaxmoe_generated_tokens_total")
    prompts = _sum(grown, "jaxmoe_prompt_tokens_total")
    # A request's last token is not computed, and a preempted one's are computed again.
    computed = prompts + generated - _sum(grown, "jaxmoe_cached_tokens_total") - len(ok)
    pairs = [
        ("requests", len(ok), _sum(grown, "jaxmoe_requests_finished_total")),
        ("prompt tokens", sum(r.prompt_tokens for r in ok), prompts),
        ("output tokens", sum(r.tokens for r in ok), generated),
        ("first tokens", len(ok), _sum(grown, "jaxmoe_time_to_first_token_seconds_count")),
    ]
    load = _load_check(grown, computed)
    if load is not None and not _sum(grown, "jaxmoe_preemptions_total"):
        pairs.append(load)
    rows = [
        {"name": f"{name}: client", "value": client, "unit": "count", "server": server}
        for name, client, server in pairs
    ]
    lines = [
        f"{name}: client {client:g}, server {server:g}"
        for name, client, server in pairs
        if client != server
    ]
    row, line = _compare_ttft(ok, grown)
    rows += row
    lines += line
    if differences:
        middle = statistics.median(differences)
        row = {"name": "queue: client minus server, median of looks", "value": middle}
        rows.append(row | {"unit": "requests", "looks": len(differences)})
        if abs(middle) > 1:  # one may be on its way
            lines.append(f"queue: the client waits for {middle:+g} more than the server has")
    return rows, lines


def _compare_ttft(ok: Sequence[Record], grown: Mapping) -> tuple[list[dict], list[str]]:
    count = _sum(grown, "jaxmoe_time_to_first_token_seconds_count")
    if not ok or not count:
        return [], []
    client = statistics.fmean(r.ttft_s for r in ok)
    server = _sum(grown, "jaxmoe_time_to_first_token_seconds_sum") / count
    row = {"name": "ttft, mean: client", "value": client * 1e3, "unit": "ms"}
    lines = []
    if server > client + _SLACK_S:
        lines.append(
            f"ttft, mean: client {client:.4f} s, server {server:.4f} s, later than the client"
        )
    return [row | {"server": server * 1e3}], lines

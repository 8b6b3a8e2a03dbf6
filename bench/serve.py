"""A server, or an engine in this process, under load: latency percentiles, goodput, tokens per second.

    jaxmoe serve small --random-weights
    python -m bench.serve --url http://127.0.0.1:8000 --concurrency 32 --requests 128 --json bench/results/serve.json
    python -m bench.serve --preset small --rate 4 --requests 200 --plot rate.png
    python -m bench.serve --url http://127.0.0.1:8000 --trace arrivals.csv

Closed loop (--concurrency): so many clients, each with one request at a time. Open loop (--rate, --trace): requests come
when they come, whether or not earlier ones have ended; latency then includes the queue. A trace is a CSV with the columns
arrival_s, prompt_tokens, output_tokens. Greedy, and output always has the length asked for. With --url the server's own
counts are compared with the client's; the server must have no other clients.
"""

import argparse
import asyncio
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench import _harness, _load, _metrics
from jaxmoe.report import make_report, write_report

QUANTILES = (50, 90, 99)
_LATE_S = 0.1  # a load generator later than this did not make the load that was asked for


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whom = options.add_mutually_exclusive_group(required=True)
    whom.add_argument("--url", help="of a running server, without /v1")
    whom.add_argument("--preset", help="an engine in this process with random weights")
    how = options.add_mutually_exclusive_group()
    how.add_argument("--concurrency", type=int, default=32, help="closed loop (the default, 32)")
    how.add_argument("--rate", type=float, help="open loop: requests per second, Poisson")
    how.add_argument("--trace", type=pathlib.Path, help="open loop: CSV of arrivals and lengths")
    options.add_argument("--requests", type=int, default=128)
    least_most = {"type": int, "nargs": "+", "metavar": "TOKENS"}
    options.add_argument("--prompt", default=[32, 256], help="least and most", **least_most)
    options.add_argument("--new", default=[16, 128], help="least and most", **least_most)
    options.add_argument("--shared-prefix", type=int, default=0, help="tokens that prompts share")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--slo-ttft", type=float, default=1.0, help="seconds, for goodput")
    options.add_argument("--slo-tpot", type=float, default=0.1, help="seconds, for goodput")
    options.add_argument("--api-key", help="the server's")
    options.add_argument("--max-running", type=int, default=32, help="with --preset")
    options.add_argument("--step-tokens", type=int, default=256, help="with --preset")
    _harness.add_dtype(options)
    options.add_argument("--json", help="write the report here")
    options.add_argument("--plot", type=pathlib.Path, help="write a picture here")
    args = options.parse_args(argv)
    for name in ("concurrency", "requests", "rate", "slo_ttft", "slo_tpot", "max_running"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            options.error(f"--{name.replace('_', '-')} must be above 0; got {value}.")
    for name in ("prompt", "new"):
        value = getattr(args, name)
        if len(value) > 2 or not 1 <= value[0] <= value[-1]:
            options.error(f"--{name} must be one or two numbers, least first; got {value}.")
    return args


def _items(args: argparse.Namespace) -> list[_load.Item]:
    if args.trace is not None:
        return _load.trace_items(args.trace, args.seed)
    return _load.random_items(
        args.requests,
        args.prompt,
        args.new,
        args.seed,
        rate=args.rate,
        shared_prefix=args.shared_prefix,
    )


async def _drive(run: _load.Run, args: argparse.Namespace, items: list[_load.Item]) -> None:
    if args.rate is None and args.trace is None:
        await run.closed_loop(items, args.concurrency)
    else:
        await run.open_loop(items)


async def _against_server(args: argparse.Namespace, items: list[_load.Item]) -> tuple:
    """The run, and the comparison with the server's own counts: rows, disagreements, or None without metrics."""
    import httpx2

    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    address = args.url.rstrip("/") + "/"
    async with httpx2.AsyncClient(
        base_url=address, headers=headers, timeout=_load.TIMEOUT_S, limits=limits
    ) as client:
        try:
            models = await client.get("v1/models")
        except httpx2.HTTPError as error:
            raise SystemExit(f"error: no server answers at {args.url} ({error}).") from error
        if models.status_code != 200:
            raise SystemExit(f"error: {args.url} answers with status {models.status_code}.")
        run = _load.Run(_load.HttpTarget(client, models.json()["data"][0]["id"]))

        async def scrape() -> _metrics.Samples:
            return _metrics.parse((await client.get("metrics")).text)

        first = await client.get("metrics")
        if first.status_code != 200 or "jaxmoe_" not in first.text:
            await _drive(run, args, items)
            return run, None
        before, differences = _metrics.parse(first.text), []
        async with _metrics.watch_queue(scrape, run, differences):
            await _drive(run, args, items)
        grown = _metrics.growth(before, await scrape())
        return run, _metrics.compare(run.records, grown, differences)


def _against_engine(args: argparse.Namespace, items: list[_load.Item]) -> _load.Run:
    from jaxmoe.engine import Engine, EngineOptions

    params, config = _harness.weights(args.preset, args.seed, args.dtype)
    size = EngineOptions(max_running=args.max_running, max_step_tokens=args.step_tokens)
    with Engine(params, config, options=size) as engine:
        engine.warmup()
        run = _load.Run(_load.EngineTarget(engine))
        asyncio.run(_drive(run, args, items))
    return run


# -- figures -----------------------------------------------------------------------------------------


def latency_rows(records: Sequence[_load.Record]) -> list[dict[str, Any]]:
    """p50, p90 and p99 of time to first token, per further token and to the end."""
    kinds = {
        "ttft": [r.ttft_s for r in records],
        "tpot": [r.tpot_s for r in records if r.tpot_s is not None],
        "end to end": [r.total_s for r in records],
    }
    return [
        {"name": f"{kind}, p{q}", "value": float(np.percentile(values, q)) * 1e3, "unit": "ms"}
        for kind, values in kinds.items()
        if values
        for q in QUANTILES
    ]


def meets(record: _load.Record, slo_ttft: float, slo_tpot: float) -> bool:
    """Whether a request ended well and in time by both measures."""
    return record.outcome == "ok" and record.ttft_s <= slo_ttft and (record.tpot_s or 0) <= slo_tpot


def rows_of(run: _load.Run, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of a run but the comparison with the server."""
    ok = [r for r in run.records if r.outcome == "ok"]
    seconds = run.ended - run.began
    good = sum(meets(r, args.slo_ttft, args.slo_tpot) for r in run.records)
    slo = {"slo_ttft_s": args.slo_ttft, "slo_tpot_s": args.slo_tpot}
    rows = [
        {"name": f"requests {outcome}", "value": n, "unit": "requests"}
        for outcome in ("ok", "refused", "failed")
        if (n := sum(r.outcome == outcome for r in run.records)) or outcome == "ok"
    ]
    rows += [
        {"name": "duration", "value": seconds, "unit": "s"},
        {"name": "output", "value": sum(r.tokens for r in ok) / seconds, "unit": "tokens/s"},
        {"name": "prompt", "value": sum(r.prompt_tokens for r in ok) / seconds, "unit": "tokens/s"},
        {"name": "finished", "value": len(ok) / seconds, "unit": "requests/s"},
        {"name": "goodput", "value": good / seconds, "unit": "requests/s", **slo},
        {"name": "within both limits", "value": good / len(run.records), "unit": "fraction", **slo},
    ]
    rows += latency_rows(ok)
    late = max(r.late_s for r in run.records)
    if late > 0:
        rows.append({"name": "load generator late by at most", "value": late * 1e3, "unit": "ms"})
    return rows


def _tell_problems(run: _load.Run, compared: tuple | None, args: argparse.Namespace) -> bool:
    """Prints what is wrong; returns whether the server's counts disagree."""
    errors = [r.error for r in run.records if r.outcome == "failed"]
    if errors:
        print(f"{len(errors)} requests failed, the first with: {errors[0]}")
    if max(r.late_s for r in run.records) > _LATE_S:
        print("The load generator was late: the load was less even than asked for.")
    if args.url and compared is None:
        print("The server has no jaxmoe metrics; its counts are not compared.")
    if compared is None:
        return False
    for line in compared[1]:
        print(f"DISAGREE {line}")
    if not compared[1]:
        print("The server's counts agree with the client's.")
    return bool(compared[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench; exits with 1 if no request ended well or the server's counts disagree."""
    args = _options(argv)
    try:
        items = _items(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    compared = None
    if args.url:
        run, compared = asyncio.run(_against_server(args, items))
    else:
        run = _against_engine(args, items)
    if not any(r.outcome == "ok" for r in run.records):
        sys.exit(f"error: no request ended well; the first: {run.records[0].error}")
    rows = rows_of(run, args) + (compared[0] if compared else [])
    _harness.finish("serve", rows, {}, None)
    if args.json:
        write_report(args.json, make_report("serve", rows, command=_command(argv)))
    if args.plot:
        from bench._serve_plot import plot

        plot(run, args.plot, args.slo_ttft, args.slo_tpot)
    if _tell_problems(run, compared, args):
        sys.exit(1)


def _command(argv: Sequence[str] | None) -> str:
    """How to run it again; an API key is not part of that."""
    words = list(sys.argv[1:] if argv is None else argv)
    hidden = [
        "KEY"
        if i and words[i - 1] == "--api-key"
        else "--api-key=KEY"
        if word.startswith("--api-key=")
        else word
        for i, word in enumerate(words)
    ]
    return " ".join(["python -m bench.serve", *hidden])


if __name__ == "__main__":
    main()

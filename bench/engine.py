"""The engine: many requests at a time against one, against transformers' static batches, and prefix reuse.

    python -m bench.engine --preset small --json bench/results/engine_small.json

One run, same weights, same requests for all sides, taking turns. Requests have random lengths and come in a closed loop:
--concurrency clients, each sending its next request when the last one has ended. transformers gets them in static
batches of as many, padded on the left, each batch generating until its longest output is done; only tokens that were
asked for count. Each engine sees a prompt once, so that no throughput comes from prefix reuse.
"""

import asyncio
import dataclasses
import os
import pathlib
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench import _harness, _load
from jaxmoe.engine import Engine, EngineOptions, SamplingParams
from jaxmoe.report import median_row

_LOOK_S = 0.25  # between looks at the engine's smoothed times
_BUSY_PERCENT = 10


def _closed_loop(
    engine: Engine, items: Sequence[_load.Item], concurrency: int, overheads: list[float]
) -> float:
    """Seconds for all requests; collects scheduling time over step time on the way."""
    run = _load.Run(_load.EngineTarget(engine))

    async def look() -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            stats = engine.stats()
            if stats.step_s:
                overheads.append(stats.schedule_s / stats.step_s)

    async def drive() -> None:
        looking = asyncio.create_task(look())
        await run.closed_loop(items, concurrency)
        looking.cancel()

    asyncio.run(drive())
    short = [r for r, item in zip(run.records, items, strict=True) if r.outcome != "ok"]
    if short or sum(r.tokens for r in run.records) != _tokens(items):
        raise SystemExit(f"error: {len(short)} requests did not end well: {short[:1]}.")
    return run.ended - run.began


def _tokens(items: Sequence[_load.Item]) -> int:
    return sum(item.output_tokens for item in items)


def _static_batches(model: Any, items: Sequence[_load.Item], batch: int) -> float:
    """Seconds for all requests as transformers' generate runs them."""
    import torch

    began = time.perf_counter()
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        longest = max(len(item.prompt) for item in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long, device=model.device)
        mask = torch.zeros_like(ids)
        for i, item in enumerate(part):
            ids[i, longest - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[i, longest - len(item.prompt) :] = 1
        new = max(item.output_tokens for item in part)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
        out.cpu()  # waits for the device
    return time.perf_counter() - began


def _ttft(engine: Engine, prompt: Sequence[int]) -> float:
    """Time to first token of one request on an idle engine, in seconds."""
    (result,) = engine.generate([prompt], SamplingParams(max_new_tokens=2, ignore_eos=True))
    return result.time_to_first_token_s


def _repeated_prompts(
    reusing: Engine, plain: Engine, args: Any
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """TTFT of a prompt's second time, with prefix reuse and without."""
    rng = np.random.default_rng(args.seed)
    seconds: dict[str, list[float]] = {"with reuse": [], "without reuse": []}
    for _ in range(args.prefix_rounds):
        prompt = rng.integers(0, 256, args.prefix).tolist()
        for name, engine in (("with reuse", reusing), ("without reuse", plain)):
            _ttft(engine, prompt)
            seconds[name].append(_ttft(engine, prompt))
    rows = [
        median_row(
            f"ttft of a repeated prompt, {name}",
            [s * 1e3 for s in values],
            "ms",
            prompt=args.prefix,
        )
        for name, values in seconds.items()
    ]
    ratio = statistics.median(seconds["without reuse"]) / statistics.median(seconds["with reuse"])
    return rows, {"ttft of a repeated prompt, without reuse over with": ratio}


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds of this process, and those of the whole machine (NaN where /proc does not say)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return used.ru_utime + used.ru_stime, float("nan")
    user, nice, system, _, _, interrupts, soft = map(int, fields[:7])
    ticks = user + nice + system + interrupts + soft
    return used.ru_utime + used.ru_stime, ticks / os.sysconf("SC_CLK_TCK")


def _others_row(before: tuple[float, float], seconds: float) -> dict[str, Any]:
    """How much of the machine's cores other processes used meanwhile: with much, the figures mean little."""
    own, whole = (after - b for after, b in zip(_cpu_seconds(), before, strict=True))
    share = max(0.0, whole - own) / (seconds * (os.cpu_count() or 1)) * 100
    if share > _BUSY_PERCENT:
        print(f"Other processes used {share:.0f}% of the cores; run it again on an idle machine.")
    return {"name": "cores used by other processes", "value": share, "unit": "%"}


def _options() -> Any:
    options = _harness.parser(__doc__.splitlines()[0])
    _harness.add_peers(options)
    _harness.add_dtype(options)
    options.set_defaults(rounds=2)
    options.add_argument("--preset", default="small")
    options.add_argument("--concurrency", type=int, default=32)
    options.add_argument("--step-tokens", type=int, default=256, help="of an engine's largest step")
    options.add_argument("--requests", type=int, default=64, help="per round")
    options.add_argument("--prompt", type=int, nargs=2, default=[32, 256], help="least and most")
    options.add_argument("--new", type=int, nargs=2, default=[32, 128], help="least and most")
    options.add_argument("--prefix", type=int, default=2048, help="tokens of the repeated prompt")
    options.add_argument("--prefix-rounds", type=int, default=5)
    return options.parse_args()


def _throughput(
    engines: dict[str, Engine], peers: dict[str, Any], args: Any
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Output tokens per second of all sides, in turns, and the scheduler's share of a step."""
    speeds: dict[str, list[float]] = {}
    overheads: list[float] = []
    for turn in range(args.rounds):
        items = _load.random_items(args.requests, args.prompt, args.new, args.seed + turn)
        seconds = {
            f"engine, {args.concurrency} at a time": _closed_loop(
                engines["many"], items, args.concurrency, overheads
            ),
            "engine, one at a time": _closed_loop(engines["one"], items, 1, []),
        }
        for name, model in peers.items():
            seconds[f"{name}, static batches of {args.concurrency}"] = _static_batches(
                model, items, args.concurrency
            )
        for name, value in seconds.items():
            speeds.setdefault(name, []).append(_tokens(items) / value)
    shape = {"preset": args.preset, "dtype": args.dtype, "requests": args.requests} | {
        "prompt": args.prompt,
        "new": args.new,
        "step_tokens": args.step_tokens,
    }
    rows = [median_row(name, values, "tokens/s", **shape) for name, values in speeds.items()]
    ours, *others = [row["value"] for row in rows]
    ratios = {f"over {row['name']}": ours / row["value"] for row in rows[1:]}
    share = [o * 100 for o in overheads]
    if share:  # a run may be over before the first look
        rows.append(median_row("scheduling, of a step", share, "%", **shape))
    return rows, ratios


def main() -> None:
    """Runs the bench."""
    args = _options()
    params, config = _harness.weights(args.preset, args.seed, args.dtype)
    peers = {}
    if args.against == "transformers":
        peers = _harness.peers(args.peers, params, config)
    size = EngineOptions(max_running=args.concurrency, max_step_tokens=args.step_tokens)
    plain = dataclasses.replace(size, prefix_reuse=False)
    engines = {
        name: Engine(params, config, options=options)
        for name, options in (("many", size), ("one", size), ("plain", plain))
    }
    began = time.perf_counter()
    executables = [engine.warmup()["executables"] for engine in engines.values()]
    print(f"warm-up: {sum(executables)} executables, {time.perf_counter() - began:.0f} s")
    few = _load.random_items(args.concurrency, [8, 16], [4, 4], args.seed + 1000)
    for engine in engines.values():
        _closed_loop(engine, few, args.concurrency, [])
    for model in peers.values():
        _static_batches(model, few, args.concurrency)
    began, used = time.perf_counter(), _cpu_seconds()
    rows, ratios = _throughput(engines, peers, args)
    more_rows, more_ratios = _repeated_prompts(engines["many"], engines["plain"], args)
    more_rows.append(_others_row(used, time.perf_counter() - began))
    for engine in engines.values():
        engine.close()
    _harness.finish("engine", rows + more_rows, ratios | more_ratios, args.json)


if __name__ == "__main__":
    main()

"""SEFP in a model: decode speed and bytes per width beside float32 and bfloat16, encoding, switching, and drafts at E5M3 for E5M8.

    python -m bench.sefp --json bench/results/sefp.json

One sequence (--batch 1), one run, taking turns; a switch's price is that of going back and forth between two widths beside staying. With
--model RUN the weights are a trained model's: how often drafts are right depends on them, and random weights are no guide to it.
"""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
import quant
from bench import _harness
from jaxmoe import checkpoint
from jaxmoe.cli._models import load
from jaxmoe.engine import Engine, EngineOptions, SamplingParams
from jaxmoe.generate import _decode, _fill
from jaxmoe.params import flatten
from jaxmoe.report import median_row
from pallas_kernels import sefp

WIDTHS = tuple(range(3, 9))


def bytes_per_token(params: Any, config: jaxmoe.ModelConfig) -> float:
    """Bytes of the weights that one sequence's decode step reads: chosen experts only, one row of the embedding."""
    total = 0.0
    for name, leaf in flatten(params).items():
        size = leaf.nbytes() if isinstance(leaf, quant.SefpTensor) else leaf.nbytes
        if "/experts/" in name:
            size *= config.num_experts_per_tok / config.n_routed_experts
        elif name == "embed/weight" and not config.tie_word_embeddings:
            size /= config.vocab_size
        total += size
    return total


def _decode_ms(params: Any, config: Any, tokens: np.ndarray, new: int) -> Callable[[], float]:
    """Milliseconds of a decode step: all tokens minus the first."""
    run = functools.partial(jaxmoe.generate, params, config, tokens)
    whole = _harness.timed(lambda: np.asarray(run(new)))
    first = _harness.timed(lambda: np.asarray(run(1)))
    return lambda: (whole() - first()) / (new - 1) * 1e3


def _decoding(plain: Any, stored: Any, config: Any, args: Any) -> tuple[list[dict], dict]:
    tokens = _harness.prompts(config, args.batch, args.prompt, args.seed)
    sides = {f"E5M{w}": quant.at_width(stored, w) for w in args.widths}
    dense = {"float32": plain}
    if not args.no_bfloat16:
        dense["bfloat16"] = jaxmoe.params.cast(plain, config, jnp.bfloat16)
    measures = {n: _decode_ms(p, config, tokens, args.new) for n, p in (dense | sides).items()}
    found = _harness.interleave(measures, rounds=args.rounds, warmup=1)
    shape = {name: getattr(args, name) for name in ("preset", "batch", "prompt", "new")}
    rows, speed, size = [], {}, {}
    for name, values in found.items():
        rows.append(median_row(f"{name}, decode step", values, "ms", **shape))
        speed[name] = args.batch / rows[-1]["value"] * 1e3
        size[name] = bytes_per_token((dense | sides)[name], config)
        rows.append({"name": f"{name}, decode", "value": speed[name], "unit": "tokens/s", **shape})
        rows.append(
            {"name": f"{name}, weights read", "value": size[name] / 1e6, "unit": "MB/token"}
        )
    ratios = {f"{n} over {d}": speed[n] / speed[d] for n in sides for d in dense}
    ratios |= {f"{n} over E5M8, bytes": size[n] / size["E5M8"] for n in sides if "E5M8" in size}
    return rows, ratios


def _sizes(stored: Any) -> tuple[list[dict], dict]:
    """What is stored, all of it, and what SEFP's part has."""
    rows = [
        {
            "name": "stored, all widths",
            "value": quant.bits_per_weight(stored),
            "unit": "bits/weight",
        }
    ]
    own = {w: sum(t.nbytes(w) for t in quant.tensors(stored)) for w in WIDTHS}
    rows += [
        {"name": f"E5M{w}, SEFP weights", "value": size / 1e6, "unit": "MB"}
        for w, size in own.items()
    ]
    return rows, {"E5M3 over E5M8, bytes of SEFP weights": own[3] / own[8]}


def _encoding(args: Any) -> list[dict]:
    """GB/s of float32 weights that are read; of dropping planes, which touches none, microseconds."""
    w = jax.random.normal(jax.random.key(args.seed), (4096, 4096), jnp.float32) * 0.02
    stored = sefp.encode(w)
    encode = jax.jit(functools.partial(sefp.encode, width=8))
    truncate = jax.jit(lambda w, width: sefp.sefp_truncate(w, width))
    measures = {
        "encode to E5M8": _harness.device_timed(lambda: encode(w)),
        "sefp_truncate to E5M4": _harness.device_timed(lambda: truncate(w, jnp.int32(4))),
        "decode from E5M8": _harness.device_timed(lambda: sefp.decode(stored, dtype=jnp.float32)),
    }
    found = _harness.interleave(measures, rounds=args.rounds)
    rows = [
        median_row(name, [w.nbytes / 1e9 / s for s in seconds], "GB/s", shape="4096x4096")
        for name, seconds in found.items()
    ]
    drop = _harness.timed(lambda: [stored.truncate(3) for _ in range(1000)])
    micros = _harness.interleave({"": drop}, rounds=args.rounds)[""]
    return [*rows, median_row("dropping planes of one matrix", [s * 1e3 for s in micros], "us")]


def _live_bytes() -> int:
    """Of all arrays that anything holds."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def _switching(stored: Any, config: Any, args: Any) -> tuple[list[dict], dict]:
    """Requests one after another at two widths in turn, beside as many at each."""
    tokens = _harness.prompts(config, 1, args.prompt, args.seed)
    low, high = min(args.widths), max(args.widths)
    trees = {w: quant.at_width(stored, w) for w in (low, high)}

    def requests(widths: tuple[int, ...]) -> Callable[[], float]:
        def run() -> None:
            for width in widths:
                np.asarray(jaxmoe.generate(trees[width], config, tokens, 8))

        return _harness.timed(run)

    measures = {"staying": requests((low, low, high, high)), "switching": requests((low, high) * 2)}
    for measure in measures.values():
        measure()
    programs, before = _decode._cache_size() + _fill._cache_size(), _live_bytes()
    found = _harness.interleave(measures, rounds=args.rounds, warmup=1)
    compiled = _decode._cache_size() + _fill._cache_size() - programs
    pairs = zip(found["switching"], found["staying"], strict=True)
    cost = [(a - b) / 2 * 1e3 for a, b in pairs]  # three switches instead of one
    kept = _live_bytes() - before
    rows = [
        median_row("a switch between requests", cost, "ms", widths=[low, high]),
        {"name": "programs compiled by switches", "value": compiled, "unit": "programs"},
        {"name": "bytes kept by switches", "value": kept, "unit": "bytes"},
    ]
    medians = {name: float(np.median(values)) for name, values in found.items()}
    return rows, {"switching over staying, time": medians["switching"] / medians["staying"]}


def _speculation(stored: Any, config: Any, args: Any) -> tuple[list[dict], dict]:
    """E5M8 with and without drafts at E5M3; all must give the same tokens."""
    sampling = SamplingParams(max_new_tokens=args.new, ignore_eos=True, width=8)
    plain = EngineOptions(max_running=1, widths=(8,), prefix_reuse=False, max_length=1024)
    engines = {0: Engine(stored, config, options=plain)}
    for drafts in args.drafts:
        options = dataclasses.replace(plain, speculative_tokens=drafts, draft_width=3)
        engines[drafts] = Engine(stored, config, options=options)
    speeds: dict[int, list[float]] = {drafts: [] for drafts in engines}
    for turn in range(-1, args.rounds):
        prompt = _harness.prompts(config, 1, args.prompt, args.seed + turn + 1)[0].tolist()
        tokens = {}
        for drafts, engine in engines.items():
            began = time.perf_counter()
            tokens[drafts] = engine.generate([prompt], sampling)[0].token_ids
            if turn >= 0:  # the first compiles
                speeds[drafts].append(args.new / (time.perf_counter() - began))
        if any(each != tokens[0] for each in tokens.values()):
            raise SystemExit("error: drafts have changed tokens; please report this.")
    rows, ratios = [], {}
    for drafts, values in speeds.items():
        name = f"E5M8 with {drafts} drafts at E5M3" if drafts else "E5M8, no drafts"
        rows.append(
            median_row(f"engine, {name}", values, "tokens/s", prompt=args.prompt, new=args.new)
        )
        if drafts:
            stats = engines[drafts].stats()
            share = 100 * stats.accepted_tokens / stats.drafted_tokens
            rows.append({"name": f"{name}, accepted", "value": share, "unit": "%"})
            ratios[f"{name}, over none"] = rows[-2]["value"] / rows[0]["value"]
        engines[drafts].close()
    return rows, ratios


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--preset", default="small")
    options.add_argument(
        "--dense", action="store_true", help="a gated MLP in every layer, no experts"
    )
    options.add_argument("--model", help="a trained run or checkpoint instead of random weights")
    options.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--rounding", choices=("truncate", "nested"), default="truncate")
    options.add_argument("--no-bfloat16", action="store_true", help="leave bfloat16 weights out")
    parts = ("decode", "encode", "switch", "speculate")
    options.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    args = options.parse_args()
    if args.model:
        args.preset = args.model
        if checkpoint.holds_sefp(args.model):
            options.error(
                f"--model must hold weights that are not in SEFP, to compare with; got {args.model}. Name what it was made from."
            )
        plain, config = load(args.model, mtp=False)
    else:
        plain, config = _harness.weights(args.preset, args.seed, dense=args.dense)
    stored = quant.quantize_params(plain, rounding=args.rounding)
    rows, ratios = _sizes(stored)
    runs: dict[str, Callable[[], tuple[list[dict], dict]]] = {
        "decode": lambda: _decoding(plain, stored, config, args),
        "encode": lambda: (_encoding(args), {}),
        "switch": lambda: _switching(stored, config, args),
        "speculate": lambda: _speculation(stored, config, args),
    }
    for part in args.part:
        more_rows, more_ratios = runs[part]()
        rows, ratios = rows + more_rows, ratios | more_ratios
    _harness.finish("sefp", rows, ratios, args.json)


if __name__ == "__main__":
    main()

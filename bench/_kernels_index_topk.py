"""Index top-k of ``bench.kernels``: DeepSeek-V3.2's indexer, 64 heads of 128, in bfloat16.

Prefill is one causal sequence whose last --index-queries tokens are the queries, in TFLOP/s of the pairs that see each other.
Decode is a token per sequence over pages of 64, in GB/s of keys read once; layers of the cache take turns, so that keys come from
memory and not from the L2 cache. "scores" and "thresholds" are the Mosaic backend's two kernels by themselves.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench._harness import Runs
from pallas_kernels import index_topk, index_topk_step
from pallas_kernels._pallas import interpret_gpu, multiprocessors
from pallas_kernels.index_topk import config, mosaic_gpu

SIDES, DTYPE = ("xla", "mosaic_gpu"), "bfloat16"
HEADS, SIZE, PAGE = 64, 128, 64
ROTATED_BYTES = 300e6  # of keys, before any is read again

# Beside the heuristic's choice; timed with --index-variants.
VARIANTS: tuple[dict[str, int], ...] = (
    {"warpgroups": 2},
    {"warpgroups": 4, "depth": 1},
    {"queries": 4, "together": 4, "warpgroups": 2},
    {"queries": 4, "together": 1},
    {"digit": 1},
    {"resident": 2**15},
    {"resident": 0},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this op's own."""
    parser.add_argument("--index-queries", type=int, default=4096, help="0: no prefill")
    parser.add_argument("--index-keys", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--index-batches", type=int, nargs="*", default=[1, 16, 128])
    parser.add_argument("--index-contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--index-topk", type=int, default=2048)
    parser.add_argument("--index-variants", action="store_true")


def runs(args: Any) -> Runs:
    """What to run, its work and that work's unit. Prints each program's temporary memory, and checks it first."""
    names = args.against
    exact = cases()
    for side, change in _sides(args, names).items():
        check(side, change, exact)
    done: Runs = {}
    if args.index_queries:
        for keys in args.index_keys:
            done |= _prefill(args, names, keys)
    for batch, context in itertools.product(args.index_batches, args.index_contexts):
        done |= _decode(args, names, batch, context)
    return done


def check(side: str, change: dict[str, int], cases: list[Any]) -> None:
    """Selections must equal the reference's."""
    for op, make, inputs, expected in cases:
        wrong = int((jax.jit(make(side, change))(*inputs) != expected).sum())
        print(f"{op}, {side}: {wrong} positions differ from the reference's")
        if wrong:
            raise SystemExit(f"{op}, {side}: {wrong} positions differ from the reference's")


def cases() -> list[Any]:
    """(op, what makes it of a side, inputs, the reference's selection), where scores are exact: small whole numbers.

    Rows of the one op are longer than the kernel by default holds in shared memory, of the other shorter; but not in a simulator,
    where they would take minutes.
    """
    random, simulated = np.random.default_rng(0), jax.default_backend() == "cpu"
    keys, tokens, width, topk = (300, 3, 4, 64) if simulated else (20000, 13, 80, 2048)

    def whole(*shape: int) -> jax.Array:
        return jnp.asarray(random.integers(-2, 3, shape), jnp.bfloat16)

    weights = whole(2, tokens, HEADS).astype(jnp.float32)
    operands = (whole(2, tokens, HEADS, SIZE), whole(2, keys, SIZE), weights)
    visible = jnp.asarray(random.integers(0, keys + 1, (2, tokens)), jnp.int32)
    pages = jnp.asarray(random.permutation(2 * width).reshape(2, width), jnp.int32)
    lengths = jnp.asarray([width * PAGE - 120, 77], jnp.int32)
    step = (whole(2, 2, HEADS, SIZE), whole(1, 2 * width, PAGE, SIZE), 0, whole(2, 2, SIZE))
    step = (*step, weights[:, :2], lengths, pages)
    return [
        (
            op,
            functools.partial(make, topk=topk),
            inputs,
            jax.jit(make("reference", {}, topk))(*inputs),
        )
        for op, make, inputs in (
            ("index_topk", _selection, (*operands, visible)),
            ("index_topk_step", _step_selection, step),
        )
    ]


def _selection(side: str, change: dict[str, int], topk: int) -> Callable[..., jax.Array]:
    """What a side does with q, k, weights and visible."""

    def select(q, k, weights, visible):
        if not change:
            return index_topk(q, k, weights, topk, visible=visible, implementation=side)
        sizes = dataclasses.replace(config.chosen(q.shape, k.shape[1], multiprocessors()), **change)
        return mosaic_gpu.index_topk(q, k, weights, topk, visible, sizes)

    return select


def _step_selection(side: str, change: dict[str, int], topk: int) -> Callable[..., jax.Array]:
    """What a side does with q, cached, layer, own, weights, lengths and pages."""

    def select(q, cached, layer, own, weights, lengths, pages):
        operands = (q, cached, layer, own, weights, lengths, topk)
        if not change:
            return index_topk_step(*operands, pages=pages, implementation=side)
        keys = pages.shape[1] * cached.shape[2] + own.shape[1]
        sizes = dataclasses.replace(config.chosen(q.shape, keys, multiprocessors()), **change)
        return mosaic_gpu.index_topk_step(*operands, pages, None, sizes)

    return select


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _compiled(name: str, f: Callable[..., Any], *operands: Any) -> Callable[..., Any]:
    compiled = jax.jit(f).lower(*operands).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{name}: {temporary / 2**20:.1f} MiB temporary")
    return compiled


def _cycled(run: Callable[..., Any], operands: list[tuple[Any, ...]]) -> Callable[[], Any]:
    turns = itertools.cycle(operands)
    return lambda: run(*next(turns))


def _sides(args: Any, names: list[str]) -> dict[str, dict[str, int]]:
    """What to time: the backends, and the kernel with other sizes."""
    sides: dict[str, dict[str, int]] = {name: {} for name in names}
    if args.index_variants and "mosaic_gpu" in names:
        sides |= {f"mosaic_gpu {change}": change for change in VARIANTS}
    return sides


def _prefill_inputs(args: Any, keys: int) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
    """(visible, several of (q, k, weights))."""
    tokens = args.index_queries
    visible = jnp.arange(keys - tokens + 1, keys + 1, dtype=jnp.int32)[None]
    weights = _random(9, 1, tokens, HEADS).astype(jnp.float32)
    return visible, [
        (_random(i, 1, tokens, HEADS, SIZE), _random(i + 4, 1, keys, SIZE), weights)
        for i in range(4)
    ]


def _prefill(args: Any, names: list[str], keys: int) -> Runs:
    visible, inputs = _prefill_inputs(args, keys)
    work = 2 * float(visible.sum()) * HEADS * SIZE / 1e12
    done: Runs = {}
    for side, change in _sides(args, names).items():
        name = f"index_topk, {side}, prefill {args.index_queries} x {keys}"
        f = functools.partial(_selection(side, change, args.index_topk), visible=visible)
        done[name] = _cycled(_compiled(name, f, *inputs[0]), inputs), work, "TFLOP/s"
    if "mosaic_gpu" in names:
        done |= _kernels(args, inputs, visible)
    return done


def variants(
    args: Any,
) -> Iterator[tuple[tuple[int, int, int], list[tuple[dict[str, int], Callable[[], Any]]]]]:
    """((batch, queries, keys), the kernel with the heuristic's sizes and with others, all named) of every prefill and decode."""
    for keys in args.index_keys if args.index_queries else ():
        visible, inputs = _prefill_inputs(args, keys)
        runs = []
        for change in settings(1, args.index_queries, keys):
            select = _selection("mosaic_gpu", change, args.index_topk)
            run = jax.jit(functools.partial(select, visible=visible))
            runs.append((change, _cycled(run, inputs)))
        yield (1, args.index_queries, keys), runs
    for batch, context in itertools.product(args.index_batches, args.index_contexts):
        lengths, pages, operands = _decode_inputs(args, batch, context)
        runs = []
        for change in settings(batch, 1, context + 1):
            select = _step_selection("mosaic_gpu", change, args.index_topk)
            run = jax.jit(functools.partial(select, lengths=lengths, pages=pages))
            runs.append((change, _cycled(run, operands)))
        yield (batch, 1, context + 1), runs  # the step's own key is one of them


def settings(batch: int, tokens: int, keys: int) -> list[dict[str, int]]:
    """Sizes worth timing, the heuristic's first; whatever was measured before."""
    sizes = config.heuristic(batch, tokens, keys, multiprocessors())
    # A decode has one query to a sequence.
    changes = ({}, *(c for c in VARIANTS if tokens > 1 or "queries" not in c))
    found = [config.fitting(dataclasses.replace(sizes, **c), HEADS, SIZE) for c in changes]
    return [vars(c) for c in dict.fromkeys(found)]


def _kernels(args: Any, inputs: list[Any], visible: jax.Array) -> Runs:
    """The two kernels on one tile of the last queries."""
    q, k, weights = inputs[0]
    sizes = config.chosen(q.shape, k.shape[1], multiprocessors())
    tile = min(q.shape[1], max(sizes.queries, sizes.scores // k.shape[1]))
    interpret, seen = interpret_gpu(), visible[:, -tile:]
    width = -(-k.shape[1] // sizes.chunk) * sizes.chunk
    zero, table = jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), jnp.int32)

    def scores(q: jax.Array, k: jax.Array, weights: jax.Array) -> jax.Array:
        operands = (q[:, -tile:], k[None], zero, table, weights[:, -tile:], seen)
        return mosaic_gpu.score_keys(*operands, width, sizes, interpret)

    found = jax.jit(scores)
    ordered = found(q, k, weights)[0]
    search = jax.jit(lambda x: mosaic_gpu.thresholds(x, seen[0], args.index_topk, sizes, interpret))
    pairs = float(seen.sum())
    name = f"{tile} x {k.shape[1]}"
    return {
        f"scores, {name}": (_cycled(found, inputs), 2 * pairs * HEADS * SIZE / 1e12, "TFLOP/s"),
        f"thresholds, {name}": (lambda: search(ordered), 4 * pairs / 1e9, "GB/s"),
    }


def _decode_inputs(
    args: Any, batch: int, context: int
) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, ...]]]:
    """(lengths, pages, (q, cached, layer, own, weights) of every layer)."""
    layers = max(1, int(-(-ROTATED_BYTES // (2 * SIZE * batch * context))))
    width = context // PAGE
    cached = _random(0, layers, batch * width, PAGE, SIZE)
    order = np.random.default_rng(args.seed).permutation(batch * width)
    pages = jnp.asarray(order.reshape(batch, width), jnp.int32)
    q, own = _random(1, batch, 1, HEADS, SIZE), _random(2, batch, 1, SIZE)
    weights = _random(3, batch, 1, HEADS).astype(jnp.float32)
    lengths = jnp.full(batch, context, jnp.int32)
    return lengths, pages, [(q, cached, jnp.int32(i), own, weights) for i in range(layers)]


def _decode(args: Any, names: list[str], batch: int, context: int) -> Runs:
    lengths, pages, operands = _decode_inputs(args, batch, context)
    done: Runs = {}
    for side, change in _sides(args, names).items():
        if "queries" in change:
            continue  # a decode has one query to a sequence
        name = f"index_topk_step, {side}, decode {batch} x {context}"
        f = functools.partial(
            _step_selection(side, change, args.index_topk), lengths=lengths, pages=pages
        )
        run = _cycled(_compiled(name, f, *operands[0]), operands)
        done[name] = run, 2 * SIZE * batch * context / 1e9, "GB/s"
    return done

"""Dispatch and combine of ``bench.kernels``: GB/s of the bytes that must move, whatever a backend moves.

    python -m bench.kernels --op dispatch --shape 256 8 7168 0 --tokens 16384 --against xla mosaic_gpu --variants

Dispatch reads T rows and writes T * A; combine reads T * A and writes T. Ranking and counting are part of dispatch. Indices, a
thousandth of it, are not counted.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench._harness import Runs
from pallas_kernels import combine, dispatch
from pallas_kernels.moe_dispatch import api, mosaic_gpu, payload
from pallas_kernels.moe_dispatch.config import Config

SIDES, DTYPE = ("xla", "mosaic_gpu"), "bfloat16"

# Pipelines that fit rows of 14 KB: of what is copied, summed and encoded.
COPIES = (Config(1, 14, 7), Config(2, 6, 3), Config(2, 6, 1), Config(3, 4, 2), Config(4, 2, 1))
SUMS = (Config(1, 12, 2), Config(2, 4, 2), Config(3, 2, 1))
ENCODINGS = (Config(1, 12, 2), Config(2, 5, 2), Config(2, 4, 4), Config(3, 3, 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this op's own."""
    parser.add_argument("--variants", action="store_true", help="time pipelines and rankings too")


def runs(args: Any) -> Runs:
    """What to run, its work and that work's unit. Sizes come from --tokens and --shape, of which OUT means nothing here."""
    experts, active, hidden, _ = args.shape
    x, ids, weights = inputs(args.tokens, hidden, experts, active, args.seed)
    moved = jax.jit(lambda x, ids: dispatch(x, ids, experts, implementation="xla"))(x, ids)
    backends = args.against
    for name in backends:
        if name != "xla":
            _check(name, x, ids, weights, experts, moved)
    rows_bytes = moved.rows.nbytes + x.nbytes
    narrow_bytes = x.nbytes + ids.size * (hidden + hidden // 32)
    done: Runs = {}
    for name in backends:
        there, encoded, back, both = _functions(name, experts)
        done |= {
            # Rows are dropped at once, or queued calls would hold all of theirs.
            f"dispatch, {name}": (lambda f=there: f(x, ids)[1], rows_bytes / 1e9, "GB/s"),
            f"dispatch, {name}, fp8": (lambda f=encoded: f(x, ids)[1], narrow_bytes / 1e9, "GB/s"),
            f"combine, {name}": (
                lambda f=back: f(moved.rows, moved.position, weights),
                rows_bytes / 1e9,
                "GB/s",
            ),
            f"dispatch + combine, {name}": (
                lambda f=both: f(x, ids, weights),
                2 * rows_bytes / 1e9,
                "GB/s",
            ),
        }
    if args.variants:
        done |= (
            _pipelines(x, ids, moved, weights, rows_bytes, narrow_bytes)
            if "mosaic_gpu" in backends
            else {}
        )
        done |= _rankings(ids, experts)
    return done


def inputs(tokens: int, hidden: int, experts: int, active: int, seed: int) -> tuple[jax.Array, ...]:
    """(x, expert ids, weights): distinct experts per token, drawn on the device."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (tokens, hidden), jnp.bfloat16)
    _, ids = lax.top_k(jax.random.uniform(keys[1], (tokens, experts)), active)
    weights = jax.nn.softmax(jax.random.normal(keys[2], (tokens, active), jnp.float32))
    return x, ids.astype(jnp.int32), weights


def _functions(name: str, experts: int) -> tuple[Callable[..., Any], ...]:
    """(dispatch, dispatch to fp8, combine, both) of a backend, jitted."""

    def there(x: jax.Array, ids: jax.Array) -> Any:
        return dispatch(x, ids, experts, implementation=name)

    def encoded(x: jax.Array, ids: jax.Array) -> Any:
        return dispatch(x, ids, experts, dtype=jnp.float8_e4m3fn, implementation=name)

    def back(rows: jax.Array, position: jax.Array, weights: jax.Array) -> jax.Array:
        return combine(rows, position, weights, implementation=name)

    def both(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        moved = there(x, ids)
        # An expert would stand here: XLA must not fuse the two gathers into one.
        return back(lax.optimization_barrier(moved.rows), moved.position, weights)

    return tuple(jax.jit(f) for f in (there, encoded, back, both))


def _check(name: str, x: Any, ids: Any, weights: Any, experts: int, moved: Any) -> None:
    """Raises unless a backend moves the same rows as XLA, bit by bit, and sums them alike."""
    there, encoded, back, _ = _functions(name, experts)
    _, reference, reference_back, _ = _functions("xla", experts)

    @jax.jit
    def different(a: Any, b: Any) -> jax.Array:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum((p.astype(jnp.float32) != q.astype(jnp.float32)).sum() for p, q in pairs)

    wrong = int(different(there(x, ids), moved))
    wrong_encoded = int(different(encoded(x, ids), reference(x, ids)))
    got = back(moved.rows, moved.position, weights).astype(jnp.float32)
    expected = reference_back(moved.rows, moved.position, weights).astype(jnp.float32)
    error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
    print(
        f"{name}: {wrong} numbers differ, fp8 {wrong_encoded}; combine's relative error {error:.1e}"
    )
    # Sums differ by the last bit of bfloat16 where a product is rounded before it is added.
    if wrong or wrong_encoded or not error < 2e-3:
        raise SystemExit(f"{name} is wrong")


def variants(
    x: jax.Array, ids: jax.Array, moved: Any, weights: jax.Array
) -> dict[str, list[tuple[Config, Callable[[], list[jax.Array]]]]]:
    """The kernels alone, without ranking, in every pipeline; each returns a few numbers and then its rows."""
    count = ids.size
    pair = (
        jnp.zeros(count, jnp.int32)
        .at[moved.position.reshape(-1)]
        .set(jnp.arange(count, dtype=jnp.int32))
    )
    index = pair // ids.shape[1]

    def gather(config: Config, to: Any) -> Callable[[], list[jax.Array]]:
        run = jax.jit(lambda x, i, t: [i[:1], *mosaic_gpu.gather_rows(x, i, t, to, config=config)])
        return lambda: run(x, index, moved.position)

    def add(config: Config) -> Callable[[], list[jax.Array]]:
        run = jax.jit(lambda r, p, w: [p[:1], mosaic_gpu.weighted_sum(r, p, w, config=config)])
        return lambda: run(moved.rows, moved.position, weights)

    return {
        "copy": [(c, gather(c, None)) for c in COPIES],
        "sum": [(c, add(c)) for c in SUMS],
        "encode": [(c, gather(c, payload.FP8)) for c in (*ENCODINGS, Config(2, 8, 4, fuse=False))],
    }


def _pipelines(x, ids, moved, weights, rows_bytes: float, narrow_bytes: float) -> Runs:
    done: Runs = {}
    for movement, found in variants(x, ids, moved, weights).items():
        work = (narrow_bytes if movement == "encode" else rows_bytes) / 1e9
        for config, run in found:
            # Rows are dropped at once, or queued calls would hold all of theirs.
            done[f"{movement} alone, {_named(config)}"] = lambda f=run: f()[0], work, "GB/s"
    return done


def _named(c: Config) -> str:
    return f"{c.blocks} blocks, {c.depth} loads, {c.stores} stores" + (
        "" if c.fuse else ", XLA encodes"
    )


def _rankings(ids: jax.Array, experts: int) -> Runs:
    """Ways to rank and count the pairs, and their parts."""
    flat = ids.reshape(-1)
    index = jnp.arange(flat.size, dtype=jnp.int32)

    def pairs(keys: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(lax.sort((keys, index), num_keys=1, is_stable=True))

    variants = {
        "rank and count": lambda k: api._order(k, experts),
        "one-word sort": lambda k: api._sorted(k, experts),
        "sort of pairs": pairs,
        "count by one hot": lambda k: jax.nn.one_hot(k, experts, dtype=jnp.int32).sum(0),
        "count by scatter": lambda k: jnp.zeros(experts, jnp.int32).at[k].add(1),
    }
    done: Runs = {}
    for name, variant in variants.items():
        f = jax.jit(variant)
        done[f"{name}, {flat.size} pairs"] = lambda f=f: f(flat), flat.size / 1e9, "Gpairs/s"
    return done

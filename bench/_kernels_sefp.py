"""SEFP for ``bench.kernels``: products from the stored bits beside bfloat16 ones, and truncation beside a copy.

A call multiplies by several matrices one after another, more than the L2 holds at the width in question. Work is the bytes of the
weights as they are stored, so that GB/s beside the copy's says how near their ceiling is. A product from E5M3 takes
GB/s(dense) / GB/s(E5M3) * 0.258 of the dense one's time, of E5M8 0.570. "dense" is XLA's bfloat16 product.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench._harness import Runs
from pallas_kernels import _pallas, sefp
from pallas_kernels.sefp import Sefp, reference
from pallas_kernels.sefp.config import Tiling, key_of, tilings
from pallas_kernels.sefp.mosaic_gpu import sefp_matmul as gpu_matmul

_ROTATED = 100e6  # bytes: more than the L2 holds (60 MB on an H200); each matrix more is one kernel more to compile
SIDES = ("xla", "native", "mosaic_gpu", "dense")


def add_arguments(options: argparse.ArgumentParser) -> None:
    """Which layers, widths and batches; other tilings of the Hopper kernel to time beside the heuristic's."""
    layers = [(4096, 4096), (4096, 14336), (14336, 4096)]
    options.add_argument(
        "--layers", nargs="+", type=_layer, default=layers, metavar="KxN", help="in x out"
    )
    options.add_argument("--widths", nargs="+", type=int, default=list(range(3, 9)))
    options.add_argument("--batches", nargs="+", type=int, default=[1])
    options.add_argument(
        "--tilings", nargs="*", type=_tiling, default=[], metavar="WARPGROUPS,SPLITS,GROUPS,STAGES"
    )
    options.add_argument(
        "--part", nargs="+", choices=["matmul", "truncate"], default=["matmul", "truncate"]
    )


def _layer(text: str) -> tuple[int, int]:
    inner, columns = map(int, text.split("x"))
    return inner, columns


def _tiling(text: str) -> Tiling:
    return Tiling(*map(int, text.split(",")))


def _stored(layer: tuple[int, int], narrowest: int, seed: int) -> list[Sefp]:
    """Weights at width 8, as many as exceed the L2 at ``narrowest``."""
    inner, columns = layer
    count = int(_ROTATED / (inner * columns * sefp.bits_per_weight(narrowest) / 8)) + 1
    count = count if jax.default_backend() == "gpu" else 1
    keys = jax.random.split(jax.random.key(seed), count)
    return [sefp.encode(jax.random.normal(key, layer, jnp.float32) * 0.02) for key in keys]


def _chain(one: Callable[[jax.Array, Any], jax.Array]) -> Callable[[jax.Array, list], list]:
    """A jitted function that applies ``one`` to x and each of the weights, in order."""
    one = jax.jit(one)  # lowered once

    @jax.jit
    def run(x: jax.Array, weights: list) -> list:
        results = []
        for w in weights:
            y = one(x, w)
            x, y = lax.optimization_barrier((x, y))  # the next begins when this one is done
            results.append(y)
        return results

    return run


def _check(name: str, got: jax.Array, expected: jax.Array, bound: float) -> None:
    error = float(jnp.abs(got.astype(jnp.float32) - expected).max() / jnp.abs(expected).max())
    print(f"{name}: relative error {error:.2g}", flush=True)
    if not error <= bound:
        raise SystemExit(f"{name}: relative error {error} is above {bound}")


def _matmul(args: Any, layer: tuple[int, int]) -> Runs:
    runs, (inner, columns) = {}, layer
    stored = _stored(layer, min(args.widths), args.seed)
    dtype = jnp.dtype(args.dtype)
    sides = {
        name: functools.partial(sefp.sefp_matmul, implementation=name)
        for name in args.against
        if name != "dense"
    }
    for t in args.tilings:
        name = f"mosaic_gpu {t.warpgroups},{t.splits},{t.groups},{t.stages}"
        sides[name] = functools.partial(_with_tiling, t)
    for batch in args.batches:
        x = jax.random.normal(jax.random.key(args.seed + 1), (batch, inner), dtype)
        label = f"{inner}x{columns} batch {batch}"
        if "dense" in args.against:
            dense = [sefp.decode(s, dtype=dtype) for s in stored[: -(-len(stored) // 3)]]
            run = _chain(jnp.matmul)
            work = sum(w.nbytes for w in dense) / 1e9
            name = f"{label}, dense {args.dtype}, {len(dense)} in turn"
            runs[name] = functools.partial(run, x, dense), work, "GB/s"
        for width in args.widths:
            narrow = [s.truncate(width) for s in stored]
            expected = reference.sefp_matmul(x, narrow[-1])
            for side, multiply in sides.items():
                name = f"{label} E5M{width}, {side}, {len(narrow)} in turn"
                run = _chain(multiply)
                try:
                    _check(name, run(x, narrow)[-1], expected, 1e-2)
                except NotImplementedError as refusal:
                    print(f"{name}: {refusal}", flush=True)
                    continue
                work = sum(s.nbytes() for s in narrow) / 1e9
                runs[name] = functools.partial(run, x, narrow), work, "GB/s"
    return runs


def variants(
    args: argparse.Namespace, layer: tuple[int, int], batch: int, width: int
) -> tuple[str, jax.Array, list[tuple[Tiling, Callable[[], Any]]]]:
    """The Hopper kernel's key, what the last of several matrices gives, and every tiling's product with each."""
    narrow = [s.truncate(width) for s in _stored(layer, width, args.seed)]
    x = jax.random.normal(jax.random.key(args.seed + 1), (batch, layer[0]), jnp.bfloat16)
    groups, columns = narrow[0].exponent.shape
    shape = groups, columns, -(-batch // 8) * 8, len(narrow[0].planes)
    runs = [
        (t, functools.partial(_chain(functools.partial(_with_tiling, t)), x, narrow))
        for t in tilings(*shape, _pallas.multiprocessors())
    ]
    return key_of(*shape), reference.sefp_matmul(x, narrow[-1]), runs


def _with_tiling(tiling: Tiling, x: jax.Array, s: Sefp) -> jax.Array:
    groups, columns = s.exponent.shape
    if columns % (64 * tiling.warpgroups) or groups % (tiling.splits * tiling.groups):
        raise NotImplementedError("the tiling does not divide these weights")
    return gpu_matmul(x, s, tiling=tiling).astype(x.dtype)


def _truncate(args: Any, layer: tuple[int, int]) -> Runs:
    runs = {}
    dtype = jnp.dtype(args.dtype)
    count = (
        1 + int(_ROTATED / (layer[0] * layer[1] * dtype.itemsize))
        if jax.default_backend() == "gpu"
        else 1
    )
    keys = jax.random.split(jax.random.key(args.seed), count)
    weights = [jax.random.normal(key, layer, dtype) * 0.02 for key in keys]
    for side in args.against:
        if side not in ("xla", "mosaic_gpu"):
            continue

        def one(width: jax.Array, w: jax.Array, side: str = side) -> jax.Array:
            return sefp.sefp_truncate(w, width, implementation=side)

        run, width = _chain(one), jnp.int32(4)
        name = f"{layer[0]}x{layer[1]} {args.dtype} sefp_truncate, {side}, {count} in turn"
        expected = sefp.decode(sefp.encode(weights[-1]), width=4, dtype=jnp.float32)
        _check(name, run(width, weights)[-1], expected, 0.0)
        work = 2 * sum(w.nbytes for w in weights) / 1e9
        runs[name] = functools.partial(run, width, weights), work, "GB/s"
    return runs


def runs(args: argparse.Namespace) -> Runs:
    """What to time: see ``bench.kernels``."""
    parts = {"matmul": _matmul, "truncate": _truncate}
    found: Runs = {}
    for part in args.part:
        for layer in args.layers:
            found |= parts[part](args, layer)
    return found

"""Sparse latent attention of ``bench.kernels``: TFLOP/s of 2 * queries * heads * K * (576 + 512), whatever a backend multiplies.

Decode steps of DeepSeek-V3.2: K random rows of each sequence's first --contexts rows, in a cache of as many rows as the longest.
Row numbers change from call to call, so that every call reads rows that are not in the L2 cache. Prefill is one sequence of
--queries queries. torch gathers the same rows and runs its scaled_dot_product_attention on them.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench._harness import Runs
from pallas_kernels import _pallas, cache_rows, sparse_mla, sparse_mla_step
from pallas_kernels.sparse_mla import addresses, config, mosaic_gpu
from pallas_kernels.sparse_mla.config import Config

SIDES, DTYPE = ("xla", "mosaic_gpu", "torch"), "bfloat16"
SIZE, VALUES = 576, 512
SCALE = 0.1352337788608801
ROTATED_BYTES = 300e6  # of rows, before any is read again
# Random rows that caches repeat: drawing all of them takes memory several times theirs.
PATTERN_ROWS = 4096

# What a call for every multiprocessor may be run with, and one for few of them.
FULL = (
    Config(),
    Config(prefetch=True),
    Config(producer_registers=56, consumer_registers=224),
    Config(producer_registers=104, consumer_registers=200),
    Config(prefetch=True, producer_registers=104, consumer_registers=200),
    Config(splits=2),
)
SPLITS = (1, 2, 4, 8, 16, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this op's own."""
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=4096, help="of the prefill; 0 for none")
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "fp8"])
    parser.add_argument("--variants", action="store_true", help="time the kernel's settings too")


def runs(args: Any) -> Runs:
    """What to run, its work and that work's unit."""
    backends = [name for name in args.against if name != "torch"]
    done: Runs = {}
    for stored in args.formats:
        case = Decode(args, stored)
        for name in backends:
            if name != "xla":
                _check(name, stored, case)
        for batch, context in itertools.product(args.batches, args.contexts):
            work = _work(batch, args), "TFLOP/s"
            label = f"decode {stored}, {batch} queries of {context}"
            for name in backends:
                done[f"{label}, {name}"] = (case.step(name, batch, context), *work)
            if args.variants and context == min(args.contexts):
                done |= {
                    f"{label}, {_named(c)}": (f, *work) for c, f in variants(case, batch, context)
                }
            if "torch" in args.against and stored == "bfloat16" and context == min(args.contexts):
                torch_run = _torch(batch, context, args)
                if torch_run is not None:
                    done[f"{label}, torch"] = torch_run, *work
    if args.queries:
        for name in backends:
            done |= _prefill(name, args)
    return done


def _work(queries: int, args: Any) -> float:
    return 2 * queries * args.heads * args.topk * (SIZE + VALUES) / 1e12


def _pattern(stored: str, seed: int = 0) -> jax.Array:
    rows = jax.random.normal(jax.random.key(seed), (PATTERN_ROWS, SIZE), jnp.float32)
    return cache_rows.encode(rows, VALUES, cache_rows.FORMATS[stored])


class Decode:
    """A cache with a page of the longest context per sequence, and steps over it."""

    def __init__(self, args: Any, stored: str):
        self.args, batch, length = args, max(args.batches), max(args.contexts)
        length = -(-length // PATTERN_ROWS) * PATTERN_ROWS
        pattern = _pattern(stored)
        shape = (batch, length // PATTERN_ROWS, *pattern.shape)
        fill = jax.jit(lambda x: jnp.broadcast_to(x, shape).reshape(1, batch, length, -1))
        self.cached = fill(pattern)
        self.own = pattern[None, :batch]
        self.row_bytes = pattern.nbytes // PATTERN_ROWS
        self.q = jax.random.normal(jax.random.key(1), (batch, 1, args.heads, SIZE), jnp.bfloat16)
        self.q = self.q * 0.1  # logits of deviation 0.3, so that many rows count

    def operands(self, batch: int, context: int) -> list[tuple[jax.Array, ...]]:
        """(q, cache, layer, own, rows, pages) as often as it takes to read ``ROTATED_BYTES``."""
        topk = self.args.topk
        count = int(np.ceil(ROTATED_BYTES / (batch * topk * self.row_bytes))) + 1
        draw = jax.jit(
            lambda key: jnp.argsort(jax.random.uniform(key, (batch, 1, context)))[..., :topk]
        )
        pages = jnp.arange(batch, dtype=jnp.int32)[:, None]
        keys = jax.random.split(jax.random.key(self.args.seed), count)
        return [
            (self.q[:batch], self.cached, jnp.int32(0), self.own, draw(k).astype(jnp.int32), pages)
            for k in keys
        ]

    def step(self, name: str, batch: int, context: int) -> Callable[[], Any]:
        """A backend's step; each call has the next operands."""
        return _cycled(_step(name), self.operands(batch, context))


@functools.cache  # contexts share a program
def _step(name: str) -> Callable[..., Any]:
    @jax.jit
    def step(q, cached, layer, own, rows, pages):
        return sparse_mla_step(
            *(q, cached, layer, own, rows),
            scale=SCALE,
            value_dim=VALUES,
            pages=pages,
            implementation=name,
        )

    return step


def _cycled(run: Callable[..., Any], operands: list[Any]) -> Callable[[], Any]:
    each = itertools.cycle(operands)
    return lambda: run(*next(each))


def _check(name: str, stored: str, case: Decode) -> None:
    """Raises unless a backend's results are XLA's; with gaps, and rows of the step's own."""
    batch = min(4, max(case.args.batches))
    q, cached, layer, own, rows, pages = case.operands(batch, min(case.args.contexts))[0]
    rows = rows.at[:, :, 5::9].set(-1).at[:, :, -300:-1].set(-1)
    rows = rows.at[:, :, -1].set(cached.shape[2] + jnp.arange(batch, dtype=jnp.int32)[:, None])
    own = own[:, :batch]
    got, expected = (_step(n)(q, cached, layer, own, rows, pages) for n in (name, "xla"))
    got, expected = (jax.tree.map(lambda x: x.astype(jnp.float32), r) for r in (got, expected))
    error = float(jnp.linalg.norm(got[0] - expected[0]) / jnp.linalg.norm(expected[0]))
    lse_error = float(jnp.abs(got[1] - expected[1]).max())
    print(f"{name}, {stored}: relative error {error:.1e}, of the log denominator {lse_error:.1e}")
    # Both round weights and results to 8 bits, at different points.
    if not error < 1e-2 or not lse_error < 1e-2:
        raise SystemExit(f"{name} is wrong")


def _named(c: Config) -> str:
    registers = f"{c.producer_registers} and {c.consumer_registers}"
    return f"splits {c.splits}, prefetch {c.prefetch}, registers {registers}"


def settings(blocks: int, columns: int, *, eight_bit: bool) -> list[Config]:
    """Those worth timing, the heuristic's first, whatever was measured before; arguments as of ``config.of_call``."""
    multiprocessors = _pallas.multiprocessors()
    chosen = config.heuristic(blocks, columns, multiprocessors, eight_bit=eight_bit)
    found = [chosen, *FULL]
    if blocks < multiprocessors:
        splits = [s for s in SPLITS if s * blocks <= 4 * multiprocessors]
        found += [dataclasses.replace(chosen, splits=s) for s in splits]
    return list(dict.fromkeys(found))


def variants(case: Decode, batch: int, context: int) -> list[tuple[Config, Callable[[], Any]]]:
    """The kernel in every setting that makes sense for the batch; each call has the next operands."""

    def attend(q, *step, config):
        rows = addresses.chosen_of_step(*step)
        interpret = _pallas.interpret_gpu()
        out, lse = mosaic_gpu.attend(
            q[:, 0], rows, SCALE, VALUES, config=config, interpret=interpret
        )
        return out[:, None], lse[:, None]

    operands = case.operands(batch, context)
    return [
        (c, _cycled(jax.jit(functools.partial(attend, config=c)), operands))
        for c in dict.fromkeys(settings)
    ]


def _prefill(name: str, args: Any) -> Runs:
    """One sequence of ``--queries`` queries, each with --topk of as many rows; and, at a quarter of them, its gradient."""
    length = max(args.queries, 2 * args.topk)
    kv = jnp.resize(_pattern("bfloat16"), (1, length, SIZE))

    def inputs(queries: int) -> tuple[jax.Array, ...]:
        q = jax.random.normal(jax.random.key(2), (1, queries, args.heads, SIZE), jnp.bfloat16)
        chosen = jnp.argsort(jax.random.uniform(jax.random.key(3), (1, queries, length)))
        return q * 0.1, kv, chosen[..., : args.topk].astype(jnp.int32)

    def attend(q, kv, indices):
        return sparse_mla(q, kv, indices, scale=SCALE, value_dim=VALUES, implementation=name)

    def loss(q, kv, indices):
        return attend(q, kv, indices)[0].astype(jnp.float32).sum()

    whole, part = inputs(args.queries), inputs(args.queries // 4)
    forward, gradient = jax.jit(attend), jax.jit(jax.grad(loss, (0, 1)))
    # Logits and the weights' gradient again, then a product with each for dq and for both parts of dkv.
    products = 2 * SIZE + 2 * VALUES + SIZE
    share = (SIZE + VALUES + products) / (SIZE + VALUES)
    return {
        f"prefill bfloat16, {args.queries} queries, {name}": (
            lambda: forward(*whole),
            _work(args.queries, args),
            "TFLOP/s",
        ),
        f"forward and gradient bfloat16, {args.queries // 4} queries, {name}": (
            lambda: gradient(*part),
            _work(args.queries // 4, args) * share,
            "TFLOP/s",
        ),
    }


def _torch(batch: int, context: int, args: Any) -> Callable[[], Any] | None:
    """Gathered rows in torch's attention, heads as its queries; None where there is no torch with a GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    cache = torch.randn(batch * context, SIZE, **like)
    q = 0.1 * torch.randn(batch, 1, args.heads, SIZE, **like)
    count = int(np.ceil(ROTATED_BYTES / (batch * args.topk * SIZE * 2))) + 1
    first = torch.arange(batch, device="cuda")[:, None] * context
    rows = [
        torch.rand(batch, context, device="cuda").argsort(-1)[:, : args.topk] + first
        for _ in range(count)
    ]
    each = itertools.cycle(rows)

    def run() -> Any:
        kv = cache[next(each)][:, None]
        return torch.nn.functional.scaled_dot_product_attention(
            q, kv, kv[..., :VALUES], scale=SCALE
        )

    return run

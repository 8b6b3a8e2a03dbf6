"""The grouped matmul and both of its gradients, checked against float32 products and ready to be timed.

Every call multiplies by the next of several copies of the weights, so that none is found in the cache that the call before left it
in. Ours addresses the copy in the stack of all, by ``group_offset``, as a model does its layers.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench._harness import Runs
from pallas_kernels import grouped_matmul
from pallas_kernels.numerics import dot, precision_of

Run = Callable[[], Any]

# Of the largest number of the result: bfloat16 results are off by 2**-9 of their own size, and sums of other order by less.
_TOLERANCE = 2**-7
_ROTATE_BYTES = 2**28  # Several times the L2 of an H200.
PRODUCTS = ("forward", "dx", "dw")
SIDES = ("xla", "native", "mosaic_gpu", "ragged_dot", "dense", "batched", "tokamax", "torch")


def add_arguments(parser: Any) -> None:
    """Beside --shape, --tokens, --dtype, --against and --seed."""
    parser.add_argument(
        "--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS), help="to time"
    )
    parser.add_argument(
        "--load",
        choices=["uniform", "skewed"],
        default="uniform",
        help="how tokens choose experts; skewed: with probabilities like 1 / (8 + rank)",
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """Operands of one shape; ``w`` holds ``copies`` times as many matrices as there are groups."""

    x: jax.Array
    w: jax.Array
    dy: jax.Array
    sizes: np.ndarray
    copies: int

    @property
    def flops(self) -> float:
        """Of one product, useful ones only."""
        return 2.0 * self.x.shape[0] * self.x.shape[1] * self.dy.shape[1]


def _random(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normal numbers of deviation 0.05, made one slice of the first axis at a time: there may be billions."""

    def slice_(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape[1:], dtype) * jnp.asarray(0.05, dtype)

    return jax.jit(lambda keys: jax.lax.map(slice_, keys))(jax.random.split(key, shape[0]))


def problem(
    shape: tuple[int, int, int, int], tokens: int, dtype: str, *, load: str, seed: int
) -> Problem:
    """``tokens`` tokens that choose ``active`` of ``experts`` experts; shape is (experts, active, in, out)."""
    experts, active, inner, columns = shape
    generator = np.random.default_rng(seed)
    # The largest of log-weights plus Gumbel noise: a draw without replacement.
    noise = generator.gumbel(size=(tokens, experts))
    if load == "skewed":
        noise -= np.log(8 + generator.permutation(experts))
    chosen = np.argpartition(-noise, active - 1, axis=-1)[:, :active]
    sizes = np.bincount(chosen.reshape(-1), minlength=experts).astype(np.int32)
    read = np.count_nonzero(sizes) * inner * columns * jnp.dtype(dtype).itemsize
    copies = min(16, 1 + _ROTATE_BYTES // int(read)) if read < _ROTATE_BYTES else 1
    keys = jax.random.split(jax.random.key(seed), 3)
    rows = tokens * active
    return Problem(
        _random(keys[0], (rows, inner), dtype),
        _random(keys[1], (copies * experts, inner, columns), dtype),
        _random(keys[2], (rows, columns), dtype),
        sizes,
        copies,
    )


def products_of(multiply: Callable[..., jax.Array]) -> dict[str, Callable[..., jax.Array]]:
    """The product and its gradients as functions of (x, w, dy, sizes, offset); of each only what it needs is computed."""

    def gradient(of: int) -> Callable[..., jax.Array]:
        def run(x, w, dy, sizes, offset):
            pullback = jax.vjp(lambda x, w: multiply(x, w, sizes, offset), x, w)[1]
            return pullback(dy)[of]

        return run

    return {
        "forward": lambda x, w, dy, sizes, offset: multiply(x, w, sizes, offset),
        "dx": gradient(0),
        "dw": gradient(1),
    }


def ours(implementation: str) -> dict[str, Callable[..., jax.Array]]:
    """The three products by one of our backends."""

    def multiply(x, w, sizes, offset):
        return grouped_matmul(x, w, sizes, group_offset=offset, implementation=implementation)

    return products_of(multiply)


@functools.partial(jax.jit, static_argnames=("product", "window"))
def _errors(x, w, dy, result, first, start, size, matrix, place, *, product, window):
    """Largest difference from the float32 product of one group, and its largest number."""
    part = lambda a: jax.lax.dynamic_slice_in_dim(a, first, window)  # noqa: E731
    at = lambda a, i: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)  # noqa: E731
    row = first + jnp.arange(window, dtype=jnp.int32)
    mine = ((row >= start) & (row < start + size))[:, None]
    x, dy = (jnp.where(mine, part(a), jnp.zeros((), a.dtype)) for a in (x, dy))
    match product:
        case "forward":
            want, got = dot(x, at(w, matrix), (1, 0)), part(result)
        case "dx":
            want, got = dot(dy, at(w, matrix), (1, 1)), part(result)
        case _:
            want, got, mine = dot(x, dy, (0, 0)), at(result, place), jnp.ones((1, 1), bool)
    off = jnp.where(mine, jnp.abs(got.astype(jnp.float32) - want), 0.0)
    return off.max(), jnp.abs(want).max()


def check(case: Problem, product: str, result: jax.Array, offset: int) -> float:
    """Compares some groups, among them the ends, the largest and the smallest; returns the largest relative error.

    Raises:
      AssertionError: if it is not small.
    """
    sizes, experts = case.sizes, len(case.sizes)
    starts = np.cumsum(sizes) - sizes
    window = min(len(case.x), 1 << int(max(sizes.max() - 1, 1)).bit_length())
    picked = {0, experts // 2, experts - 1, int(sizes.argmax()), int(sizes.argmin())}
    worst = 0.0
    for g in sorted(picked):
        start, size = int(starts[g]), int(sizes[g])
        first = min(start, len(case.x) - window)
        place = offset + g if len(result) == len(case.w) else g
        where = (jnp.int32(i) for i in (first, start, size, offset + g, place))
        operands = (case.x, case.w, case.dy, result)
        off, scale = _errors(*operands, *where, product=product, window=window)
        # An empty group's gradient must be zero, which nothing is small against.
        error = float(off) / float(scale) if scale > 0 else float(off > 0)
        worst = float(np.maximum(worst, error))  # NaN stays.
    if not worst < _TOLERANCE:
        raise AssertionError(f"{product} is off by {worst:.3g} of its largest number")
    return worst


def checked(case: Problem, name: str, product: str, run: Callable[..., jax.Array]) -> Run:
    """``run``, jitted, on the next copy of the weights at each call; first it runs on the last, and how far off it was is printed."""
    if product == "dw":  # Of as many matrices as there are groups: the copies are not read.
        case = dataclasses.replace(case, w=case.w[: len(case.sizes)], copies=1)
    run, sizes = jax.jit(run), jnp.asarray(case.sizes)
    offsets = [i * len(case.sizes) for i in range(case.copies)]
    result = run(case.x, case.w, case.dy, sizes, jnp.int32(offsets[-1]))
    error = check(case, product, result, offsets[-1])
    print(f"{name}: off by {error:.1e} of the largest", flush=True)
    order = itertools.cycle([jnp.int32(o) for o in offsets])
    return lambda: run(case.x, case.w, case.dy, sizes, next(order))


def _dense(case: Problem, tokens: int) -> Run:
    """Every token by every matrix."""
    experts, precision = len(case.sizes), precision_of(case.x.dtype)
    x = case.x[:tokens]

    @jax.jit
    def run(x, w, offset):
        w = jax.lax.dynamic_slice_in_dim(w, offset, experts)
        return jnp.einsum("td,edf->etf", x, w, precision=precision)

    order = itertools.cycle([jnp.int32(i * experts) for i in range(case.copies)])
    return lambda: run(x, case.w, next(order))


def _batched(case: Problem, product: str) -> Run:
    """The same work with groups of equal size, as one batched product: what a grouped one is measured by."""
    experts, precision = len(case.sizes), precision_of(case.x.dtype)
    even = len(case.x) // experts * experts
    x, dy = (a[:even].reshape(experts, -1, a.shape[1]) for a in (case.x, case.dy))
    formula = {"forward": "erk,ekn->ern", "dx": "ern,ekn->erk", "dw": "erk,ern->ekn"}[product]
    run = jax.jit(functools.partial(jnp.einsum, formula, precision=precision))
    order = itertools.cycle(_copies(case))
    match product:
        case "forward":
            return lambda: run(x, next(order))
        case "dx":
            return lambda: run(dy, next(order))
        case _:
            return lambda: run(x, dy)


def _copies(case: Problem) -> list[jax.Array]:
    """One array for each copy, for those that can't address a stack."""
    return jnp.split(case.w, case.copies)


def _tokamax(case: Problem, product: str) -> Run:
    import tokamax

    def multiply(x, w, sizes, offset):
        return tokamax.ragged_dot(x, w, sizes)

    run, sizes = jax.jit(products_of(multiply)[product]), jnp.asarray(case.sizes)
    order = itertools.cycle(_copies(case))
    return lambda: run(case.x, next(order), case.dy, sizes, None)


def _torch(case: Problem, product: str) -> Run:
    import torch

    if not torch.cuda.is_available() or case.x.dtype != jnp.bfloat16:
        raise NotImplementedError("torch's grouped product needs a GPU and bfloat16")
    x, dy, w = (torch.from_dlpack(a) for a in (case.x, case.dy, case.w))
    order = itertools.cycle(w.chunk(case.copies))
    ends = torch.tensor(np.cumsum(case.sizes), dtype=torch.int32, device="cuda")
    match product:
        case "forward":
            return lambda: torch._grouped_mm(x, next(order), offs=ends)
        case "dx":
            return lambda: torch._grouped_mm(dy, next(order).transpose(-2, -1), offs=ends)
        case _:
            return lambda: torch._grouped_mm(x.t(), dy, offs=ends)


def _run(case: Problem, side: str, product: str, name: str, tokens: int) -> Run:
    match side:
        case "dense":
            return _dense(case, tokens)
        case "batched":
            return _batched(case, product)
        case "tokamax":
            return _tokamax(case, product)
        case "torch":
            return _torch(case, product)
        case _:
            return checked(case, name, product, ours(side)[product])


def runs(args: Any) -> Runs:
    """What to time: each of ``args.against`` on each of ``args.products``."""
    case = problem(args.shape, args.tokens, args.dtype, load=args.load, seed=args.seed)
    found: Runs = {}
    for side, product in itertools.product(args.against, args.products):
        if side == "dense" and product != "forward":
            continue
        name = f"grouped_matmul, {side}, {product}, {args.tokens} tokens"
        try:
            run = _run(case, side, product, name, args.tokens)
            jax.block_until_ready(run()) if side != "torch" else run()
        except (ImportError, NotImplementedError) as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        found[name] = run, case.flops / 1e12, "TFLOP/s"
    return found

"""What the machine can do at best, and how near the kernels come to it.

    python -m bench.kernels --op ceilings --json bench/results/kernels_ceilings.json
    python -m bench.kernels --op grouped_matmul --dtype bfloat16 --against xla dense tokamax torch

Times on the device, several calls queued. The grouped matmul's rows are those of --tokens tokens over random experts. "dense"
multiplies every token by every matrix, as GPUs do so far; tokamax and torch are timed where they are installed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import _harness
from jaxmoe.report import median_row
from pallas_kernels import grouped_matmul
from pallas_kernels.numerics import dot, precision_of

Runs = dict[
    str, tuple[Callable[[], Any], float, str]
]  # what to run, its work, and that work's unit per second


def _random(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype) * 0.05


def _ceilings(size: int) -> Runs:
    """A large matrix product in either type, and a large copy."""
    runs: Runs = {}
    for dtype in ("bfloat16", "float32"):
        n = size if dtype == "bfloat16" else size // 2
        a, b = _random(0, (n, n), dtype), _random(1, (n, n), dtype)
        product = jax.jit(lambda a, b: dot(a, b, (1, 0)).astype(a.dtype))
        name = f"matmul {n} x {n} x {n}, {dtype}"
        runs[name] = lambda f=product, a=a, b=b: f(a, b), 2 * n**3 / 1e12, "TFLOP/s"
    x = jnp.ones((4 * size, size), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    runs[f"copy of {x.nbytes / 2**20:.0f} MiB"] = lambda: copy(x), 2 * x.nbytes / 1e9, "GB/s"
    return runs


def _torch_run(x: jax.Array, w: jax.Array, sizes: np.ndarray) -> Callable[[], Any] | None:
    import torch

    if not torch.cuda.is_available() or x.dtype != jnp.bfloat16:
        return None
    xt, wt = (
        torch.tensor(np.asarray(a, np.float32), dtype=torch.bfloat16, device="cuda") for a in (x, w)
    )
    ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
    return lambda: torch._grouped_mm(xt, wt, offs=ends)


def _grouped(args: Any) -> Runs:
    experts, active, inner, columns = args.shape
    chosen = np.argsort(np.random.default_rng(args.seed).random((args.tokens, experts)), axis=-1)
    sizes = np.bincount(chosen[:, :active].reshape(-1), minlength=experts).astype(np.int32)
    x = _random(2, (args.tokens * active, inner), args.dtype)
    w = _random(3, (experts, inner, columns), args.dtype)
    flops = 2 * x.shape[0] * inner * columns / 1e12
    groups = jnp.asarray(sizes)

    def ours(name: str) -> Callable[[], Any]:
        run = jax.jit(lambda x, w, s: grouped_matmul(x, w, s, implementation=name))
        return lambda: run(x, w, groups)

    def dense() -> Callable[[], Any]:
        tokens, precision = x[: args.tokens], precision_of(x.dtype)
        run = jax.jit(lambda t, w: jnp.einsum("td,edf->etf", t, w, precision=precision))
        return lambda: run(tokens, w)

    def tokamax() -> Callable[[], Any]:
        import tokamax

        run = jax.jit(tokamax.ragged_dot)
        return lambda: run(x, w, groups)

    runs: Runs = {}
    for name in args.against:
        if name == "torch":
            run = _torch_run(x, w, sizes)
        else:
            run = {"dense": dense, "tokamax": tokamax}.get(name, lambda name=name: ours(name))()
        if run is not None:
            runs[f"grouped_matmul, {name}, {args.tokens} tokens"] = run, flops, "TFLOP/s"
    return runs


def _timed(name: str, run: Callable[[], Any], calls: int) -> Callable[[], float]:
    if ", torch" not in name:
        return _harness.device_timed(run, calls)
    import torch

    def several() -> None:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()

    measure = _harness.timed(several)
    return lambda: measure() / calls


def main() -> None:
    """Runs the bench."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--op", choices=["ceilings", "grouped_matmul"], required=True)
    options.add_argument("--size", type=int, default=8192, help="of the ceilings' matrices")
    shape = {"nargs": 4, "metavar": ("EXPERTS", "ACTIVE", "IN", "OUT")}
    options.add_argument("--shape", type=int, default=[64, 6, 1024, 1024], **shape)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--calls", type=int, default=20, help="queued on an accelerator")
    sides = ["xla", "ragged_dot", "native", "dense", "tokamax", "torch"]
    options.add_argument("--against", nargs="+", choices=sides, default=["xla", "dense"])
    _harness.add_dtype(options)
    args = options.parse_args()
    runs = _ceilings(args.size) if args.op == "ceilings" else _grouped(args)
    measures = {name: _timed(name, run, args.calls) for name, (run, _, _) in runs.items()}
    rows = []
    for name, values in _harness.interleave(measures, rounds=args.rounds).items():
        _, work, unit = runs[name]
        rows.append(median_row(name, [work / s for s in values], unit))
        rows.append(median_row(f"{name}, time", [s * 1e6 for s in values], "us"))
    _harness.finish("kernels", rows, {}, args.json)


if __name__ == "__main__":
    main()

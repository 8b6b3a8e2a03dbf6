"""What the machine can do at best, and how near the kernels come to it.

    python -m bench.kernels --op ceilings --json bench/results/kernels_ceilings.json
    python -m bench.kernels --op grouped_matmul --shape 256 8 7168 2048 --tokens 16384 --against mosaic_gpu tokamax torch
    python -m bench.kernels --op dispatch sparse_mla sefp --against xla mosaic_gpu

Times on the device, several calls queued. The ceilings, a large matrix product and a large copy, are measured in the same run, and
each row says what part of its own it reaches. ``--op X --help`` lists the options of an op; each takes those that it knows. "dense"
multiplies every token by every matrix, as GPUs do without a kernel; "batched" does the same work as a grouped product with groups
of equal size; tokamax and torch are timed where they are installed.
"""

import argparse
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench import _harness
from bench._harness import Runs
from jaxmoe.report import make_report, median_row, write_report
from pallas_kernels.numerics import dot

OPS = {
    "grouped_matmul": "_kernels_grouped_matmul",
    "dispatch": "_kernels_moe_dispatch",
    "index_topk": "_kernels_index_topk",
    "sparse_mla": "_kernels_sparse_mla",
    "sefp": "_kernels_sefp",
}
_SIDES = ["xla", "ragged_dot", "native", "mosaic_gpu", "dense", "batched", "tokamax", "torch"]


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


def _rows(runs: Runs, args: argparse.Namespace, ceilings: dict[str, float]) -> list[dict]:
    measures = {name: _timed(name, run, args.calls) for name, (run, _, _) in runs.items()}
    rows = []
    for name, values in _harness.interleave(measures, rounds=args.rounds).items():
        _, work, unit = runs[name]
        row = median_row(name, [work / s for s in values], unit)
        if unit in ceilings:
            row["of_ceiling"] = row["value"] / ceilings[unit]
        rows += [row, median_row(f"{name}, time", [s * 1e6 for s in values], "us")]
        share = f"  {row['of_ceiling']:6.1%} of ceiling" if unit in ceilings else ""
        time = statistics.median(values) * 1e6
        print(f"{name:60}  {row['value']:10.4g} {unit:8} {time:10.1f} us{share}", flush=True)
    return rows


def _options(module: Any | None) -> argparse.ArgumentParser:
    options = _harness.parser(__doc__.splitlines()[0])
    ops = ["ceilings", *OPS]
    options.add_argument("--op", nargs="+", choices=ops, required=True)
    options.add_argument("--size", type=int, default=8192, help="of the ceilings' matrices")
    shape = {"nargs": 4, "metavar": ("EXPERTS", "ACTIVE", "IN", "OUT")}
    options.add_argument("--shape", type=int, default=[64, 6, 1024, 1024], **shape)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--calls", type=int, default=20, help="queued on an accelerator")
    options.add_argument("--against", nargs="+", choices=_SIDES, default=["xla", "dense"])
    _harness.add_dtype(options)
    if hasattr(module, "add_arguments"):
        module.add_arguments(options)
    return options


def main() -> None:
    """Runs the bench."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--op", nargs="+", default=[])
    chosen = [op for op in first.parse_known_args()[0].op if op in OPS]
    modules = [importlib.import_module(f"bench.{OPS[op]}") for op in chosen]
    if len(modules) <= 1:  # An unknown option is an error if there is nobody else to know it.
        parsed = [_options(*modules or [None]).parse_args()]
    else:
        parsed = [_options(module).parse_known_args()[0] for module in modules]
    args = parsed[0]
    rows = _rows(_ceilings(args.size), args, {})
    for module, own in zip(modules, parsed, strict=False):
        ceilings = {
            r["unit"]: r["value"] for r in rows if own.dtype in r["name"] or "copy" in r["name"]
        }
        rows += _rows(module.runs(own), own, ceilings)
    if args.json:
        write_report(args.json, make_report("kernels", rows, {}))


if __name__ == "__main__":
    main()

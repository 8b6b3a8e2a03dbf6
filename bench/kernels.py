"""What the machine can do at best, and how near the kernels come to it.

    python -m bench.kernels --op ceilings --json bench/results/kernels_ceilings.json
    python -m bench.kernels --op grouped_matmul --shape 256 8 7168 2048 --tokens 16384 --against mosaic_gpu,tokamax,torch
    python -m bench.kernels --op dispatch sparse_mla sefp --against xla,mosaic_gpu

Times on the device, several calls queued. The ceilings, a large matrix product and a large copy, are measured in the same run, and
each row says what part of its own it reaches. ``--op X --help`` lists the options of an op; each takes those that it knows. "dense"
multiplies every token by every matrix, as GPUs do without a kernel; "batched" does the same work as a grouped product with groups
of equal size; tokamax and torch are timed where they are installed and have the op. Types of the grouped matmul and of SEFP's products
are bfloat16 on accelerators and float32 on CPU unless --dtype says otherwise; the others' are bfloat16. The report's ratios are our
speeds over those of others that moved or computed as much. ``bench.kernel_goals`` runs what has a goal.
"""

import argparse
import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
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
# Ours, and what they are compared with.
_OURS = ("xla", "native", "mosaic_gpu")
_PEERS = ("ragged_dot", "dense", "batched", "tokamax", "torch")


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
    for name, values in _harness.interleave(
        measures, rounds=args.rounds, warmup=args.warmup
    ).items():
        _, work, unit = runs[name]
        row = median_row(name, [work / s for s in values], unit)
        if unit in ceilings:
            row["of_ceiling"] = row["value"] / ceilings[unit]
        rows += [row, median_row(f"{name}, time", [s * 1e6 for s in values], "us")]
        share = f"  {row['of_ceiling']:6.1%} of ceiling" if unit in ceilings else ""
        time = statistics.median(values) * 1e6
        print(f"{name:60}  {row['value']:10.4g} {unit:8} {time:10.1f} us{share}", flush=True)
    return rows


def _sides(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in _OURS + _PEERS:
            known = ", ".join(_OURS + _PEERS)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    return names


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Speeds of ours over everything else that did the same: whose name differs in the side alone, as "OP, SIDE, SHAPE"."""
    speeds: dict[str, dict[str, float]] = {}
    for row in rows:
        parts = row["name"].split(", ")
        side = next((part for part in parts if part in _OURS + _PEERS), None)
        if side is not None and row["unit"].endswith("/s"):
            what = ", ".join(part for part in parts if part != side)
            speeds.setdefault(what, {})[side] = row["value"]
    return {
        f"{what}: {ours} over {peer}": of_side[ours] / of_side[peer]
        for what, of_side in speeds.items()
        for ours in _OURS
        for peer in of_side
        if ours in of_side and peer != ours and not (ours == "xla" and peer in _OURS)
    }


def options_of(module: Any | None) -> argparse.ArgumentParser:
    """What ``bench.tune`` has too: shapes and calls, and what an op's module adds."""
    options = _harness.parser(__doc__.splitlines()[0])
    shape = {"nargs": 4, "metavar": ("EXPERTS", "ACTIVE", "IN", "OUT")}
    options.add_argument("--shape", type=int, default=[64, 6, 1024, 1024], **shape)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--calls", type=int, default=20, help="queued on an accelerator")
    _harness.add_dtype(options)
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    options.set_defaults(dtype=getattr(module, "DTYPE", default))
    if hasattr(module, "add_arguments"):
        module.add_arguments(options)
    return options


def _options(module: Any | None) -> argparse.ArgumentParser:
    options = options_of(module)
    options.add_argument("--op", nargs="+", choices=["ceilings", *OPS], required=True)
    options.add_argument("--size", type=int, default=8192, help="of the ceilings' matrices")
    options.add_argument("--warmup", type=int, default=2, help="rounds that don't count")
    options.add_argument(
        "--against",
        nargs="+",
        type=_sides,
        default=[["xla"]],
        metavar="SIDE[,SIDE]",
        help=f"of {', '.join(_OURS + _PEERS)}",
    )
    return options


def _parsed(modules: list[Any]) -> list[argparse.Namespace]:
    """Options as each module has them; one that nobody knows is an error."""
    found = [_options(module).parse_known_args() for module in modules or [None]]
    known_to_none = [o for o in found[0][1] if all(o in left for _, left in found)]
    if known_to_none:
        _options(modules[0] if modules else None).error(
            f"unrecognized arguments: {' '.join(known_to_none)}"
        )
    return [args for args, _ in found]


def _timed_sides(op: str, module: Any, args: argparse.Namespace) -> list[str]:
    """The sides asked for that can do the op; says which can't."""
    asked = list(dict.fromkeys(side for group in args.against for side in group))
    left_out = [side for side in asked if side not in module.SIDES]
    if left_out:
        print(f"{op}: {', '.join(left_out)} left out; there are {', '.join(module.SIDES)}")
    if len(left_out) == len(asked):
        raise SystemExit(f"{op}: --against must name one of {', '.join(module.SIDES)}.")
    return [side for side in asked if side not in left_out]


def main() -> None:
    """Runs the bench."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--op", nargs="+", default=[])
    ops = [op for op in first.parse_known_args()[0].op if op in OPS]
    modules = [importlib.import_module(f"bench.{OPS[op]}") for op in ops]
    parsed = _parsed(modules)
    for op, module, args in zip(ops, modules, parsed, strict=False):
        args.against = _timed_sides(op, module, args)
        if args.dtype != getattr(module, "DTYPE", args.dtype):
            raise SystemExit(f"{op}: --dtype must be {module.DTYPE}; got {args.dtype}.")
    base = _rows(_ceilings(parsed[0].size), parsed[0], {})
    rows = list(base)
    for module, args in zip(modules, parsed, strict=False):
        ceilings = {
            r["unit"]: r["value"] for r in base if args.dtype in r["name"] or "copy" in r["name"]
        }
        rows += _rows(module.runs(args), args, ceilings)
    if parsed[0].json:
        write_report(parsed[0].json, make_report("kernels", rows, ratios(rows)))


if __name__ == "__main__":
    main()

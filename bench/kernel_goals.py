"""What the kernels promise on a Hopper GPU, measured and judged in one command.

    python -m bench.kernel_goals --json bench/results/gpu_kernel_goals.json
    python -m bench.kernel_goals --parts sefp_wide sparse_mla --limit 240
    python -m bench.kernel_goals --try-out

A part is a run of ``bench.kernels`` in a process of its own, with a time limit; the report is written after each. A goal without a
number (the part failed, or took too long) is not met. ``--try-out`` runs every part where there is no GPU, at sizes for the simulator,
to see that the commands work; its figures mean nothing and are not judged. Exit status: 0 if every goal is met, else 1.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax

from bench import _harness
from jaxmoe.report import make_report, write_report
from pallas_kernels import _pallas
from pallas_kernels.sefp import bits_per_weight

Rows = Mapping[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure and the least it should be.

    Attributes:
      name: what is measured.
      least: the goal.
      unit: of both.
      figure: takes a part's rows by name; KeyError if one is missing.
    """

    name: str
    least: float
    unit: str
    figure: Callable[[Rows], float]


@dataclasses.dataclass(frozen=True)
class Part:
    """Options of a run of ``bench.kernels``, and what should come out."""

    options: str
    goals: tuple[Goal, ...]


def _row(rows: Rows, pattern: str) -> dict[str, Any]:
    """The one row whose name fits.

    Raises:
      KeyError: if none or several do.
    """
    found = [row for name, row in rows.items() if re.search(pattern, name)]
    if len(found) != 1:
        raise KeyError(f"{len(found)} rows fit {pattern!r}")
    return found[0]


def _value(name: str, least: float, unit: str, pattern: str) -> Goal:
    return Goal(name, least, unit, lambda rows: _row(rows, pattern)["value"])


def _share(name: str, least: float, pattern: str) -> Goal:
    return Goal(name, least, "of the ceiling", lambda rows: _row(rows, pattern)["of_ceiling"])


def _ratio(name: str, least: float, pattern: str, peer: str, scale: float = 1.0) -> Goal:
    def figure(rows: Rows) -> float:
        return scale * _row(rows, pattern)["value"] / _row(rows, peer)["value"]

    return Goal(name, least, "x", figure)


def _grouped(shape: str, tokens: int, columns: int) -> Part:
    goals = [
        _value(f"grouped matmul to {columns}, {p}", 420, "TFLOP/s", f"mosaic_gpu, {p}, [^,]*$")
        for p in ("forward", "dx", "dw")
    ]
    options = f"--op grouped_matmul --shape {shape} {columns} --tokens {tokens} --calls 4"
    return Part(f"{options} --against mosaic_gpu torch", tuple(goals))


def _sefp(layer: str) -> Part:
    widths = range(3, 9)
    shares = [
        _share(f"sefp_matmul {layer} E5M{w}", 0.6, f"E5M{w}, mosaic_gpu.*turn$") for w in widths
    ]
    kernel, fewer_bytes = "E5M3, mosaic_gpu.*turn$", 16 / bits_per_weight(3)
    over_dense = f"sefp_matmul {layer} E5M3 over bfloat16"
    over_xla = f"sefp_matmul {layer} E5M3 over XLA's"
    return Part(
        f"--op sefp --part matmul --layers {layer} --widths 3 4 5 6 7 8 --against mosaic_gpu dense xla",
        (
            _ratio(over_dense, 2.5, kernel, ", dense .*turn$", fewer_bytes),
            *shares,
            _ratio(over_xla, 1, kernel, "E5M3, xla.*turn$"),
        ),
    )


def _sparse_mla(sizes: str, short: int, long: int) -> Part:
    near, far = (f"^decode bfloat16, .* of {n}, mosaic_gpu$" for n in (short, long))
    xla = near.replace("mosaic_gpu", "xla")
    options = f"--op sparse_mla {sizes} --contexts {short} {long} --queries 0 --formats bfloat16"
    return Part(
        f"{options} --against mosaic_gpu xla",
        (
            _value(f"sparse MLA decode over {short}", 300, "TFLOP/s", near),
            _ratio(f"sparse MLA's speed over {long} / {short}", 0.9, far, near),
            _ratio("sparse MLA decode over XLA's", 1, near, xla),
        ),
    )


def _dispatch(shape: str, tokens: int) -> Part:
    both = "^dispatch . combine, mosaic_gpu$"
    over_xla = _ratio("dispatch + combine over XLA's", 1, both, both.replace("mosaic_gpu", "xla"))
    options = f"--op dispatch --shape {shape} 0 --tokens {tokens} --calls 10"
    return Part(
        f"{options} --against xla mosaic_gpu", (_share("dispatch + combine", 0.7, both), over_xla)
    )


def _index_topk(queries: int, keys: int, batch: int, context: int, topk: int) -> Part:
    options = f"--op index_topk --index-queries {queries} --index-keys {keys} --index-batches {batch} --index-contexts {context} --index-topk {topk}"
    goals = [
        _ratio(f"{op} over XLA's", 1, f"^{op}, mosaic_gpu.*[0-9]$", f"^{op}, xla.*[0-9]$")
        for op in ("index_topk", "index_topk_step")
    ]
    return Part(f"{options} --against xla mosaic_gpu", tuple(goals))


# What has no number yet comes first, for those whose time on a GPU is short.
PARTS = {
    "sefp_wide": _sefp("4096x14336"),
    "sparse_mla": _sparse_mla("--batches 128", 8192, 131072),
    "grouped_2048": _grouped("256 8 7168", 16384, 2048),
    "grouped_1024": _grouped("256 8 7168", 16384, 1024),
    "dispatch": _dispatch("256 8 7168", 16384),
    "index_topk": _index_topk(2048, 16384, 16, 32768, 2048),
    "sefp_square": _sefp("4096x4096"),
    "sefp_narrow": _sefp("14336x4096"),
}
SMALL = {
    "sefp_wide": _sefp("128x64"),
    "sparse_mla": _sparse_mla("--batches 1 --heads 2 --topk 64", 128, 256),
    "grouped_2048": _grouped("4 2 128", 16, 128),
    "grouped_1024": _grouped("4 2 128", 16, 64),
    "dispatch": _dispatch("4 2 256", 16),
    "index_topk": _index_topk(4, 128, 1, 256, 16),
    "sefp_square": _sefp("64x64"),
    "sefp_narrow": _sefp("128x64"),
}


def judged(goals: tuple[Goal, ...], rows: Rows) -> list[dict[str, Any]]:
    """A row per goal: its figure or why there is none, and whether it is met."""
    found = []
    for goal in goals:
        row = {"name": goal.name, "unit": goal.unit, "goal": goal.least}
        try:
            value = goal.figure(rows)
        except KeyError as missing:
            found.append(row | {"value": None, "met": False, "why": str(missing.args[0])})
            continue
        found.append(row | {"value": value, "met": value >= goal.least})
    return found


def _measure(part: Part, args: argparse.Namespace) -> tuple[Rows, str | None]:
    """The part's rows by name, and what went wrong."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory) / "report.json"
        options = [*part.options.split(), "--dtype", "bfloat16", "--rounds", str(args.rounds)]
        if args.try_out:
            options += ["--size", "64", "--warmup", "0"]
        command = [sys.executable, "-m", "bench.kernels", *options]
        print("$ python", *command[1:], flush=True)
        try:
            status = subprocess.run(
                [*command, "--json", str(report)], timeout=args.limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {}, f"it took more than {args.limit:.0f} s (--limit)"
        if status:
            return {}, f"bench.kernels ended with {status}"
        rows = json.loads(report.read_text())["rows"]
    return {row["name"]: row for row in rows}, None


def _line(row: dict[str, Any], try_out: bool) -> str:
    if row["value"] is None:
        return f"{row['name']:45} no number: {row['why']}"
    verdict = "not judged" if try_out else "met" if row["met"] else "MISSED"
    return f"{row['name']:45} {row['value']:8.3g} {row['unit']:15} goal {row['goal']:<5g} {verdict}"


def _check_machine(try_out: bool) -> None:
    try:
        simulated = _pallas.interpret_gpu() is not None
    except NotImplementedError as reason:
        raise SystemExit(f"bench.kernel_goals: {reason}.") from None
    if simulated and not try_out:
        raise SystemExit(
            f"bench.kernel_goals: the goals are for a Hopper GPU; this is {jax.default_backend()}. --try-out runs the commands in a simulator."
        )


def main() -> int:
    """Runs the parts; returns the exit status."""
    # This process and a part's share the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--limit", type=float, default=300, help="seconds for a part")
    options.add_argument("--try-out", action="store_true")
    args = options.parse_args()
    _check_machine(args.try_out)
    measured: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    for name in args.parts:
        part = (SMALL if args.try_out else PARTS)[name]
        rows, failure = _measure(part, args)
        found = judged(part.goals, rows)
        if failure:
            found = [row | {"why": failure} for row in found]
        verdicts += found
        measured += [row | {"name": f"{name}: {row['name']}"} for row in rows.values()]
        if args.json:
            write_report(args.json, make_report("kernel_goals", verdicts + measured, {}))
    print(*(_line(row, args.try_out) for row in verdicts), sep="\n")
    complete = all(row["value"] is not None if args.try_out else row["met"] for row in verdicts)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

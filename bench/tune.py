"""Times a Hopper kernel's settings on this device and keeps the best in pallas_kernels/tuned/.

    python -m bench.tune --op grouped_matmul --shape 256 8 7168 2048 --tokens 16384
    python -m bench.tune --op sparse_mla --contexts 8192 --batches 1 16 128
    python -m bench.tune --op sefp --layers 4096x14336 --widths 3 8
    python -m bench.tune --op dispatch --shape 256 8 7168 0 --tokens 16384
    python -m bench.tune --op index_topk --index-keys 16384 --index-batches 16 --index-contexts 32768

Options of shapes are those of ``bench.kernels``. Writes what it found under this kind of device; measure every shape that matters,
each run adds to the table. A setting whose results are wrong, or that doesn't compile, is said and never kept.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bench import (
    _harness,
    _kernels_grouped_matmul,
    _kernels_index_topk,
    _kernels_moe_dispatch,
    _kernels_sefp,
    _kernels_sparse_mla,
    kernels,
)
from pallas_kernels import _pallas, _tuned, combine, dispatch
from pallas_kernels.grouped_matmul import config as grouped_config
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped_gpu
from pallas_kernels.index_topk import config as index_config
from pallas_kernels.moe_dispatch import config as dispatch_config
from pallas_kernels.sparse_mla import config as sparse_config


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings, and what runs with them; ``prepare`` checks its result and returns what to time."""

    settings: dict[str, Any]
    prepare: Callable[[], Callable[[], Any]]


# The table's key, and what competes for it.
Search = tuple[str, list[Candidate]]


def grouped_settings(
    product: str, rows: int, groups: int, inner: int, columns: int
) -> list[grouped_config.Tiling]:
    """Tilings worth timing of a result with so many columns, the heuristic's first."""
    if product == "dw":
        default = grouped_config.outer_heuristic(inner, columns)
    else:
        default = grouped_config.rows_heuristic(rows, groups, columns)
    found = [default, *_grouped_tilings(product, columns, rows <= 64 * groups)]
    return [t for t in dict.fromkeys(found) if product != "dw" or inner % t.tile_rows == 0]


def _grouped_tilings(product: str, columns: int, few: bool) -> Iterator[grouped_config.Tiling]:
    """``few`` rows per group want one warpgroup."""
    shapes = [(64, 64, 1), (64, 128, 1), (64, 256, 1)] if few else []
    shapes += [(64, 256, 2), (128, 128, 2)]
    shapes += [(64, 128, 2)] if few or product == "dw" else []
    for rows, width, warpgroups in shapes:
        if columns % width:
            continue
        stages = grouped_config.most_stages(rows, width, warpgroups)
        panels = {columns} if few else {columns, max(width, min(columns, 1024))}
        for panel in sorted(panels):
            yield grouped_config.Tiling(rows, width, warpgroups, stages, panel)


def _grouped(args: Any) -> Iterator[Search]:
    parts = _kernels_grouped_matmul
    case = parts.problem(args.shape, args.tokens, args.dtype, load=args.load, seed=args.seed)
    groups, _, inner, columns = args.shape
    rows = len(case.x)
    shapes = {
        "forward": ("rows", inner, columns),
        "dx": ("rows transposed", columns, inner),
        "dw": ("outer", inner, columns),
    }

    def run(x, w, dy, sizes, offset, product, tiling):
        if product == "dw":
            return grouped_gpu.groups_outer(x, dy, sizes, offset, groups, tiling=tiling)
        rows, transpose = (x, False) if product == "forward" else (dy, True)
        return grouped_gpu.rows_times_groups(
            rows, w, sizes, offset, transpose=transpose, tiling=tiling
        )

    for product in args.products:
        name, of, to = shapes[product]
        candidates = []
        for tiling in grouped_settings(product, rows, groups, of, to):
            call = functools.partial(run, product=product, tiling=tiling)
            prepare = functools.partial(parts.checked, case, product, product, call)
            candidates.append(Candidate(vars(tiling), prepare))
        yield grouped_config.key(name, rows, groups, of, to), candidates


def _agrees(
    run: Callable[[], Any],
    expected: Any,
    *,
    of: Callable[[Any], Any] = lambda result: result,
    bound: float = 2e-2,
) -> Callable[[], Any]:
    """``run``, if ``of`` what it returns first is ``expected`` up to ``bound`` of its largest number.

    Raises:
      AssertionError: if it isn't.
    """
    for got, want in zip(jax.tree.leaves(of(run())), jax.tree.leaves(expected), strict=True):
        got, want = (a.astype(jnp.float32) for a in (got, want))
        error = float(jnp.abs(got - want).max() / jnp.maximum(jnp.abs(want).max(), 1e-30))
        if not error <= bound:
            raise AssertionError(f"off by {error:.3g} of the largest number")
    return run


def _sparse_mla(args: Any) -> Iterator[Search]:
    for stored in args.formats:
        case = _kernels_sparse_mla.Decode(args, stored)
        for batch in args.batches:
            context = min(args.contexts)
            expected = case.step("xla", batch, context)()
            candidates = [
                Candidate(vars(config), functools.partial(_agrees, run, expected))
                for config, run in _kernels_sparse_mla.variants(case, batch, context)
            ]
            blocks = batch * -(-args.heads // sparse_config.HEADS)
            yield sparse_config.key_of(blocks, args.topk, stored == "fp8"), candidates


def _sefp(args: Any) -> Iterator[Search]:
    for layer, batch, width in itertools.product(args.layers, args.batches, args.widths):
        key, expected, variants = _kernels_sefp.variants(args, layer, batch, width)
        candidates = [
            Candidate(
                vars(tiling),
                functools.partial(_agrees, run, expected, of=lambda results: results[-1]),
            )
            for tiling, run in variants
        ]
        yield key, candidates


def _dispatch(args: Any) -> Iterator[Search]:
    experts, active, hidden, _ = args.shape
    x, ids, weights = _kernels_moe_dispatch.inputs(args.tokens, hidden, experts, active, args.seed)
    move = functools.partial(dispatch, x, ids, experts, implementation="xla")
    moved, encoded = move(), move(dtype=jnp.float8_e4m3fn).rows
    expected = {
        "copy": [moved.rows],
        "sum": [combine(moved.rows, moved.position, weights, implementation="xla")],
        "encode": [encoded.values, encoded.scales],
    }
    found = _kernels_moe_dispatch.variants(x, ids, moved, weights)
    for movement, variants in found.items():
        candidates = [
            Candidate(vars(config), functools.partial(_rows_agree, run, expected[movement]))
            for config, run in variants
        ]
        yield dispatch_config.key_of(movement, hidden * x.dtype.itemsize), candidates


def _rows_agree(run: Callable[[], list[jax.Array]], expected: Any) -> Callable[[], Any]:
    """As ``_agrees``; what is timed drops the rows at once, or queued calls would hold all of theirs."""
    _agrees(run, expected, of=lambda result: result[1:])
    return lambda: run()[0]


def _index_topk(args: Any) -> Iterator[Search]:
    parts = _kernels_index_topk
    cases = parts.cases()

    def prepare(change: dict[str, int], run: Callable[[], Any]) -> Callable[[], Any]:
        parts.check("mosaic_gpu", change, cases)
        return run

    for (batch, tokens, keys), variants in parts.variants(args):
        candidates = [Candidate(c, functools.partial(prepare, c, run)) for c, run in variants]
        yield index_config.key_of(batch, tokens, keys), candidates


SEARCHES = {
    "grouped_matmul": _grouped,
    "dispatch": _dispatch,
    "index_topk": _index_topk,
    "sparse_mla": _sparse_mla,
    "sefp": _sefp,
}
# Where an op's settings are kept, if not under its own name.
TABLES = {"dispatch": "moe_dispatch"}


def best_of(key: str, candidates: list[Candidate], args: Any) -> dict[str, Any] | None:
    """The fastest settings; None if none of them works."""
    found: list[tuple[float, int]] = []
    for number, candidate in enumerate(candidates):
        try:
            measure = _harness.device_timed(candidate.prepare(), args.calls)
            measure()
            seconds = statistics.median(measure() for _ in range(args.rounds))
        except (
            Exception,
            SystemExit,
        ) as error:  # A setting that doesn't work is no reason to stop.
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{key} {candidate.settings}: {reason}", flush=True)
            continue
        print(f"{key} {candidate.settings}: {seconds * 1e6:.1f} us", flush=True)
        found.append((seconds, number))
    return candidates[min(found)[1]].settings if found else None


def keep(path: pathlib.Path, key: str, settings: dict[str, Any]) -> None:
    """Puts settings into a table, beside what is there."""
    table = json.loads(path.read_text()) if path.exists() else {}
    when = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    table.setdefault(jax.devices()[0].device_kind, {})[key] = when | {"settings": settings}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Runs the search."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--op")
    op = first.parse_known_args()[0].op
    module = importlib.import_module(f"bench.{kernels.OPS[op]}") if op in SEARCHES else None
    options = kernels.options_of(module)
    options.add_argument("--op", choices=SEARCHES, required=True)
    options.add_argument("--table", type=pathlib.Path, help="default: the package's own")
    options.set_defaults(dtype="bfloat16")
    args = options.parse_args()
    try:
        simulated = _pallas.interpret_gpu() is not None
    except NotImplementedError as reason:
        raise SystemExit(f"bench.tune: {reason}.") from None
    if simulated and args.table is None:
        raise SystemExit(
            "bench.tune: there is no GPU; times of its simulator would mean nothing. --table FILE writes them where they do no harm."
        )
    path = args.table or _tuned.path_of(TABLES.get(op, op))
    for key, candidates in SEARCHES[op](args):
        settings = best_of(key, candidates, args)
        if settings is None:
            print(f"{key}: none of {len(candidates)} settings works; nothing is kept", flush=True)
        else:
            keep(path, key, settings)


if __name__ == "__main__":
    main()

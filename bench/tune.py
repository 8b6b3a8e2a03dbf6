"""Times a kernel's settings on this device and keeps the best in pallas_kernels/tuned/.

    python -m bench.tune --op grouped_matmul --shape 256 8 7168 2048 --tokens 16384

Writes what it found under this kind of device; measure every shape that matters, each run adds to the table.
"""

import datetime
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax

from bench import _harness, _kernels_grouped_matmul
from pallas_kernels import _tuned
from pallas_kernels.grouped_matmul import config, mosaic_gpu

Candidate = tuple[dict[str, Any], Callable[[], Any]]


def _grouped_settings(product: str, columns: int, few: bool) -> Iterator[config.Tiling]:
    """Tilings worth timing; ``few`` rows per group want one warpgroup."""
    shapes = [(64, 64, 1), (64, 128, 1), (64, 256, 1)] if few else []
    shapes += [(64, 256, 2), (128, 128, 2)]
    shapes += [(64, 128, 2)] if few or product == "dw" else []
    for rows, width, warpgroups in shapes:
        if columns % width:
            continue
        stages = config.most_stages(rows, width, warpgroups)
        panels = {columns} if few else {columns, max(width, min(columns, 1024))}
        for panel in sorted(panels):
            yield config.Tiling(rows, width, warpgroups, stages, panel)


def _grouped_candidates(args: Any) -> Iterator[tuple[str, float, list[Candidate]]]:
    """(key, TFLOP, candidates) of each product."""
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
            return mosaic_gpu.groups_outer(x, dy, sizes, offset, groups, tiling=tiling)
        rows, transpose = (x, False) if product == "forward" else (dy, True)
        return mosaic_gpu.rows_times_groups(
            rows, w, sizes, offset, transpose=transpose, tiling=tiling
        )

    for product in args.products:
        name, of, to = shapes[product]
        candidates = []
        for tiling in _grouped_settings(product, to, rows <= 64 * groups):
            if product == "dw" and inner % tiling.tile_rows:
                continue
            call = functools.partial(run, product=product, tiling=tiling)
            candidates.append((vars(tiling), (case, product, call)))
        yield config.key(name, rows, groups, of, to), case.flops / 1e12, candidates


def _time(args: Any, case: Any, product: str, call: Callable[..., Any]) -> float:
    """Median seconds; the result is compared first."""
    run = _kernels_grouped_matmul.checked(case, product, product, call)
    measure = _harness.device_timed(run, args.calls)
    measure()
    return statistics.median(measure() for _ in range(args.rounds))


def _keep(op: str, key: str, settings: dict[str, Any]) -> None:
    path = _tuned.path_of(op)
    table = json.loads(path.read_text()) if path.exists() else {}
    when = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    table.setdefault(jax.devices()[0].device_kind, {})[key] = when | {"settings": settings}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Runs the search."""
    options = _harness.parser(__doc__.splitlines()[0])
    options.add_argument("--op", choices=["grouped_matmul"], required=True)
    shape = {"nargs": 4, "metavar": ("EXPERTS", "ACTIVE", "IN", "OUT")}
    options.add_argument("--shape", type=int, default=[64, 6, 1024, 1024], **shape)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--calls", type=int, default=20, help="queued")
    options.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    _kernels_grouped_matmul.add_arguments(options)
    args = options.parse_args()
    for key, tflop, candidates in _grouped_candidates(args):
        best: tuple[float, dict[str, Any]] | None = None
        for settings, (case, product, call) in candidates:
            try:
                seconds = _time(args, case, product, call)
            except Exception as error:  # A setting that doesn't compile is no reason to stop.
                print(f"{key} {settings}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            print(
                f"{key} {settings}: {seconds * 1e6:.1f} us, {tflop / seconds:.0f} TFLOP/s",
                flush=True,
            )
            if best is None or seconds < best[0]:
                best = seconds, settings
        if best is not None:
            _keep(args.op, key, best[1])


if __name__ == "__main__":
    main()
